"""Runs a program that a model wrote, apart from this process. It is no security boundary.

What it stands up to is what a bad sample does by mistake or by chance: loops, forks, signals, full disks, full memory,
a flood of output. Whoever means harm finds a way: for that, run the whole of moelab in a container or a virtual machine
that has nothing to lose.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moelab.errors import ConfigError

GUARD = Path(__file__).with_name("_guard.py")
NOISE = 1 << 16  # bytes of what a program prints that are read, at most
DYING = 5.0  # seconds that are waited for a group to be gone: what was killed gives its memory back first


@dataclass(frozen=True)
class Limits:
    """What a program may take."""

    seconds: float = 5.0  # by the clock; of the processor the same, rounded up
    memory_mb: int = 512  # of addresses; an interpreter takes some 30
    file_mb: int = 1  # of one file, and of what it prints
    files: int = 16  # opened for writing, folders made, all together


@dataclass(frozen=True)
class Outcome:
    """How it ended."""

    output: str  # stdout and stderr together, at most NOISE bytes
    exit_code: int  # negative: by that signal
    timed_out: bool
    verdict: str  # what the program's last act said through `verdict(text)`; "" where it came to none


def run_program(source: str, limits: Limits = Limits()) -> Outcome:
    """Run `source`, Python, to its end or its limits, and leave nothing of it: no process, no file.

    `python -I -S` in an empty folder, without environment, stdin, network, or packages beyond Python's own. The program
    is given a function `verdict`, which says what it found. Raises ConfigError where this system can't hold it apart.
    """
    if os.name != "posix":
        raise ConfigError("code runs on Linux and macOS alone: this system has no process groups to end it by")
    folder = Path(tempfile.mkdtemp(prefix="moelab-code-"))
    try:
        return _run(source, limits, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(source: str, limits: Limits, folder: Path) -> Outcome:
    token, work = secrets.token_hex(16), folder / "work"
    work.mkdir()
    for path, text in ((folder / "program.py", source), (folder / "token", token)):
        path.write_text(text, encoding="utf-8", errors="replace")
    said = [str(value) for value in (folder, limits.seconds, limits.memory_mb, limits.file_mb, limits.files)]
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(GUARD), *said]
    with (folder / "output").open("w+b") as output:
        process = subprocess.Popen(
            command, cwd=work, env={}, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            close_fds=True, start_new_session=True,
        )  # fmt: skip
        timed_out = False
        try:
            process.wait(timeout=limits.seconds + 1)  # and what an interpreter needs to begin
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end(process)
        output.seek(0)
        text = output.read(NOISE).decode("utf-8", "replace")
    verdict = _verdict(folder / "verdict", token)
    timed_out = timed_out or process.returncode == -signal.SIGXCPU
    return Outcome(text, process.returncode, timed_out, verdict)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The whole group, what outlived its parent too."""
    until = time.monotonic() + DYING
    while time.monotonic() < until:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            break
        except PermissionError:  # macOS, of a group whose members have all ended
            break
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        time.sleep(0.001)
    process.wait()


def _verdict(path: Path, token: str) -> str:
    """What stands behind the token that the guard alone has read; "" for anything else."""
    try:
        with path.open("rb") as file:
            text = file.read(NOISE).decode("utf-8", "replace")
    except OSError:
        return ""
    return text.removeprefix(token) if text.startswith(token) else ""
