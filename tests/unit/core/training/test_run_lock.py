"""One writer to a run folder, and none to a folder that was taken away."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moelab import lock
from moelab.errors import RunFailure, UserError
from moelab.lock import LOCK
from moelab.training.run_lock import hold

HOLDER = """
import sys, time
from pathlib import Path
from moelab.training.run_lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def other(tmp_path: Path) -> Any:
    """A process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_writer_is_told_who_holds_it(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match=rf"process {other.pid} on \S+, since 20"), hold(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()


def test_it_is_told_before_it_tries(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    """A run that goes on would read checkpoints that the other one deletes meanwhile."""
    with pytest.raises(UserError, match=rf"process {other.pid} on \S+, since 20.*; wait for it, stop it, or go away"):
        lock.check_free(tmp_path / LOCK, what="it", otherwise="go away")
    other.kill()
    other.wait()
    lock.check_free(tmp_path / LOCK, what="it", otherwise="go away")  # its lock still lies there
    with hold(tmp_path):
        lock.check_free(tmp_path / LOCK, what="it", otherwise="go away")  # its own
    lock.check_free(tmp_path / LOCK, what="it", otherwise="go away")


def test_a_killed_holder_holds_nothing(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == other.pid
    with hold(tmp_path) as held_lock:
        held_lock.check()
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_folder_made_for_nothing_vanishes_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="refused"), hold(tmp_path / "run"):
        raise UserError("refused")
    assert not (tmp_path / "run").exists()
    with hold(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("locks", [True, False])
def test_a_holder_in_another_pid_namespace_is_seen_and_its_death_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    """As in another container of this machine: there it is process 1, and ours of that number is another. With the
    kernel's locks its death is seen at once, without them by its silence.
    """
    apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system lets nobody make a pid namespace")

    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    without = "" if locks else "import fcntl\ndef no(*_): raise OSError(37, '')\nfcntl.flock = no\n"
    process = subprocess.Popen(
        [*apart, sys.executable, "-c", without + HOLDER, tmp_path], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        if not locks:
            monkeypatch.setattr(fcntl, "flock", unsupported)
        with pytest.raises(UserError, match="is being written by process 1 on "), hold(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    if not locks:
        os.utime(tmp_path / LOCK, (time.time() - 2 * lock.BEAT_SECONDS,) * 2)
    for _ in range(100):  # the namespace's processes are gone a moment after its first
        try:
            with hold(tmp_path) as held_lock:
                held_lock.check()
            return
        except UserError:
            time.sleep(0.1)
    raise AssertionError("a dead process still holds the folder")


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_folder_that_is_taken_away_ends_the_run(tmp_path: Path, how: str) -> None:
    run = tmp_path / "run"
    with hold(run) as held_lock:
        if how == "moved":
            run.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(run)
        if how == "replaced":
            run.mkdir()
            (run / LOCK).touch()
        with pytest.raises(RunFailure, match="deleted, moved or taken"):
            held_lock.check()
    assert how != "replaced" or (run / LOCK).exists(), "another's lock stays"


@pytest.mark.parametrize(
    ("change", "age", "held"),
    [
        ({}, 0.0, True),  # this very process, of this boot
        ({"born": "1"}, 0.0, False),  # its number was used again
        ({"pid": 2**22 + 1, "born": "7"}, 0.0, False),  # no such process
        ({"namespace": "pid:[7]", "born": "1"}, 5.0, True),  # another container of this machine: its numbers are others
        ({"namespace": "pid:[7]"}, 2 * lock.BEAT_SECONDS, False),  # and silent since
        ({"boot": "another", "host": "node7"}, 5.0, True),  # another machine, a moment ago
        ({"boot": "another", "host": "node7"}, 2 * lock.BEAT_SECONDS, False),  # and silent since
    ],
)
def test_without_the_kernels_lock_the_text_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], age: float, held: bool
) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / LOCK).write_text(json.dumps(lock.this_process() | change))
    os.utime(tmp_path / LOCK, (time.time() - age, time.time() - age))
    if held:
        with pytest.raises(UserError, match="is being written by process"), hold(tmp_path):
            pass
    else:
        with hold(tmp_path) as held_lock:
            held_lock.check()
