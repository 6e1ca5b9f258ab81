"""Runs one input and judges it: readers in this process, command lines in a fork that is watched and limited.

Right is: success, or exit code 2 (1 for a failed run) with one message under 2,000 characters, of printable characters.
Wrong is: a traceback, a control character, 20 s of work without an end, 2 GB more than before, a file written outside
the folder, a process started, code of the folder run.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

from moelab.errors import RunFailure, UserError
from moelab_tools.cli import COMMANDS, run
from moelab_tools.compare import comparison, report, table

# What a child would do first, and slowly: imports, and a probe of the folder for temporary files.
PREPARED = [import_module(f"moelab_tools.commands.{name}") for name in COMMANDS], comparison, report, table
tempfile.gettempdir()
SECONDS, MEMORY, LONGEST = 20, 2 << 30, 2000
WAITING = (
    120  # seconds by the wall for what waits; what works is timed by the processor, whose time a busy machine keeps
)
OURS = re.compile(r'File "[^"]*/(?:core|plugins|upcycling|tools)/((?:moelab|moelab_\w+)/[^"]+)", line \d+, in (\w+)')
# Work that may last as long as it was asked to: what is stopped there had been understood.
WORK = {"train_step", "one_step", "generate", "evaluate", "evaluate_run", "build_corpus", "train_batches"}
PROCESSES = {"git", "uname"}  # what a summary asks the machine
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
LONG, HANGS = 97, 98  # exit codes of a child whose time is over


def judge_readers(readers: tuple[Callable[[Path], object], ...], folder: Path) -> str | None:
    """What is wrong with how one of these reads `folder`; None: nothing."""
    for reader in readers:
        wrong = _judge_reader(reader, folder)
        if wrong is not None:
            return wrong
    return None


def _judge_reader(reader: Callable[[Path], object], folder: Path) -> str | None:
    _start_clock(_too_long)
    try:
        with _limited():
            reader(folder)
    except (UserError, RunFailure) as error:
        message = str(error)
        if len(message) >= LONGEST or CONTROLS.search(message.replace("\n", "")):
            return f"message: {ascii(message)[:200]}"
    except TimeoutError as error:
        return f"no end: {_place(error)}"
    except BaseException as error:
        return f"{type(error).__name__}: {_place(error)}: {ascii(str(error))[:160]}"
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def judge_command(arguments: tuple[str, ...], folder: Path, inside: Path) -> str | None:
    """What is wrong with how the command line answers, run in `folder`; writing only `inside`. None: nothing."""
    out = folder.parent / f"{folder.name}.told"
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _in_child(arguments, folder, out, inside)
    code = _awaited(child)
    told = out.read_text(encoding="utf-8", errors="surrogateescape") if out.exists() else ""
    out.unlink(missing_ok=True)
    return _judged(code, told)


def _awaited(child: int) -> int:
    """Its exit code; a child that is stuck outside Python, where its own clock can't ring, is ended."""
    for _ in range(100 * 2 * WAITING):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _judged(code: int, told: str) -> str | None:
    watched = re.search(r"^WATCHED (.*)$", told, re.M)
    if watched:
        return f"watched: {watched[1][:200]}"
    if "Traceback (most recent call last)" in told:
        found = OURS.findall(told)
        last = told.strip().splitlines()[-1]
        if "can't allocate memory" in told or last.startswith("MemoryError"):
            return f"memory: {found[-1] if found else ''}"
        return f"traceback: {found[-1] if found else '?'}: {ascii(last)[:160]}"
    if code == LONG:
        return None
    if code == HANGS:
        return f"no end: {told.strip().splitlines()[-1][:200]}"
    if code not in (0, 1, 2, 130):
        return f"exit code {code}: {told[-200:]!a}"
    if CONTROLS.search(told.replace("\t", "")):
        return f"control character: {ascii(told)[:200]}"
    begins = [match.start() for match in re.finditer(r"^(?:error|failed|Error): ", told, re.M)]
    if code in (1, 2) and len(begins) != 1:
        return f"{len(begins)} messages: {told[-300:]!a}"
    if begins and len(told) - begins[0] >= LONGEST:
        return f"message of {len(told) - begins[0]} characters: {told[begins[0] :][:100]!a}"
    return None


def _in_child(arguments: tuple[str, ...], folder: Path, out: Path, inside: Path) -> NoReturn:
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    code = 70
    try:
        os.chdir(folder)
        torch.set_num_threads(1)  # the threads of the process that forked aren't here: who waits for them never ends
        _limit()
        _start_clock(_stop)
        _watch(inside)
        code = run(list(arguments))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _limit() -> int:
    """Address space: what is mapped, and MEMORY more; -> the limit before."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, hard))
    return before


@contextlib.contextmanager
def _limited() -> Any:
    before = _limit()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _watch(folder: Path) -> None:
    """Says on stderr what must not happen. An audit hook can't be taken away: in a child alone."""
    inside = os.path.realpath(folder)

    def tell(what: str) -> None:
        os.write(2, f"\nWATCHED {what!a}\n".encode())

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(details[2], int) and details[2] & WRITING:
            path = details[0]
            if isinstance(path, str | bytes) and not _belongs(os.path.realpath(os.fsdecode(path)), inside):
                tell(f"writes {os.fsdecode(path)}")
        elif event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"):
            tell(f"{event} {details[:1]}")
        elif event == "subprocess.Popen" and os.path.basename(os.fsdecode(details[0])) not in PROCESSES:
            tell(f"starts {details[0]}")
        elif event == "exec" and isinstance(details[0], types.CodeType):
            name = details[0].co_filename
            if os.path.isabs(name) and os.path.realpath(name).startswith(inside + os.sep):
                tell(f"runs {name}")
        elif event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir") and isinstance(details[0], str | bytes):
            path = os.fsdecode(details[0])
            if os.path.isabs(path) and not _belongs(os.path.realpath(path), inside):
                tell(f"{event} {path}")

    sys.addaudithook(hook)


def _belongs(path: str, inside: str) -> bool:
    return (
        path == inside
        or path.startswith((inside + os.sep, "/dev/", "/tmp/torch", "/proc/self"))
        or "__pycache__" in path
    )


def _start_clock(handler: Callable[[int, types.FrameType | None], None]) -> None:
    signal.signal(signal.SIGALRM, handler)
    signal.signal(signal.SIGPROF, handler)
    signal.alarm(WAITING)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)


def _stop(number: int, frame: types.FrameType | None) -> None:
    stack = traceback.extract_stack(frame)
    if any(entry.name in WORK for entry in stack):
        os._exit(LONG)
    ours = [entry for entry in stack if "moelab" in entry.filename]
    os.write(2, f"\n{ours[-1].filename if ours else '?'} {ours[-1].name if ours else '?'}\n".encode())
    os._exit(HANGS)


def _too_long(number: int, frame: types.FrameType | None) -> None:
    raise TimeoutError


def _place(error: BaseException) -> str:
    found = OURS.findall("".join(traceback.format_exception(error)))
    return " ".join(found[-1]) if found else "?"
