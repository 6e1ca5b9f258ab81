"""One writer at a time: a lock file that says who holds it, and ends with its process.

The kernel's lock on the file decides; it ends with its process, whatever became of it, and is seen from other
containers of this machine. Where a file system has no such lock, the file's text does: a process of this boot is
asked for, one of another machine, or of another container of this one, whose processes can't be seen from here,
counts as alive while it has touched the file within BEAT_SECONDS.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moelab.errors import UserError
from moelab.safe_files import Reading, an_object, parse_json

LOCK = ".lock"  # of a run folder
BEAT_SECONDS = 600.0  # a holder touches the file more often than this
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class FileLock:
    """Held from before the first write to after the last; made by `hold_file`."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self.file, self._descriptor = file, descriptor
        self._last_beat = time.monotonic()

    def is_there(self) -> bool:
        """Whether the file that was locked still lies where it lay."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.file))
        except FileNotFoundError:
            return False

    def beat(self) -> None:
        """Show other machines that the holder lives; cheap enough for every log and checkpoint."""
        if time.monotonic() - self._last_beat > BEAT_SECONDS / 10:
            os.utime(self._descriptor)
            self._last_beat = time.monotonic()


@contextmanager
def hold_file(file: Path, *, what: str, otherwise: str) -> Iterator[FileLock]:
    """Make and lock `file`, in its folder, which is made too; it is gone at the end.

    Raises UserError naming the process that holds it: `what` names the thing that is locked, `otherwise` says what
    to do but wait.
    """
    lock = _open(file, what, otherwise)
    try:
        yield lock
    finally:
        with contextlib.suppress(OSError):
            if lock.is_there():
                file.unlink()
        os.close(lock._descriptor)


def is_held(file: Path) -> bool:
    """Whether a living process holds the lock, told without touching it: by the file's text alone.

    A look at the kernel's lock would take it for a moment, and turn away a run that begins just then. So of another
    machine, or another container, this may still say yes for BEAT_SECONDS after the end of a process that was killed.
    """
    holder, touched = _look(file)
    return _alive(holder, touched)


def check_free(file: Path, *, what: str, otherwise: str) -> None:
    """What `hold_file` raises, before it is asked to hold, where another process of this machine holds the lock.

    Told by the file's text, as `is_held` is, and not where that leaves a doubt.
    """
    holder, _ = _look(file)
    if holder.get("pid") != os.getpid() and runs_here(holder):
        raise _held(holder, what, otherwise)


def _look(file: Path) -> tuple[dict[str, Any], float]:
    """(what the holder wrote, when it last touched the file); empty where there is none."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # none, or a link, which no run makes
        return {}, 0.0
    try:
        status = os.fstat(descriptor)
        return (_read(descriptor), status.st_mtime) if stat.S_ISREG(status.st_mode) else ({}, 0.0)
    finally:
        os.close(descriptor)


def _open(file: Path, what: str, otherwise: str) -> FileLock:
    """The file that lies there, locked; a holder may end, and remove it, before it is locked."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise UserError(f"{what} can't be written: {error.strerror}; {otherwise}") from error
        try:
            _take(descriptor, what, otherwise)
        except BaseException:
            os.close(descriptor)
            raise
        lock = FileLock(file, descriptor)
        if lock.is_there():
            return lock
        os.close(descriptor)


def _take(descriptor: int, what: str, otherwise: str) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise UserError(f"{what}: its lock is no regular file; remove it, or {otherwise}")
    holder = _read(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError as error:
        free = error.errno in _UNSUPPORTED and not _alive(holder, os.fstat(descriptor).st_mtime)
    if not free:
        raise _held(holder, what, otherwise)
    text = json.dumps(this_process()).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text, 0)


def _held(holder: dict[str, Any], what: str, otherwise: str) -> UserError:
    return UserError(
        f"{what} is being written by process {holder.get('pid', '?')} on {holder.get('host', '?')}, "
        f"since {holder.get('started', '?')}; wait for it, stop it, or {otherwise}"
    )


def _read(descriptor: int) -> dict[str, Any]:
    try:
        return an_object(parse_json(os.pread(descriptor, 4096, 0), "lock", Reading()), "lock", Reading())
    except UserError:  # empty: just made, or its maker was killed before it wrote
        return {}


def this_process() -> dict[str, Any]:
    """By what `runs_here` knows it again, on this machine or another one."""
    started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    pid = os.getpid()
    return {
        "host": socket.gethostname(), "boot": _boot(), "namespace": _namespace(), "pid": pid, "born": _born(pid),
        "started": started,
    }  # fmt: skip


def _alive(holder: dict[str, Any], touched: float) -> bool:
    if not holder:
        return False
    here = runs_here(holder)
    return time.time() - touched < BEAT_SECONDS if here is None else here


def runs_here(process: dict[str, Any]) -> bool | None:
    """Whether what `this_process` told in that process still runs; None where that can't be seen from here."""
    if process.get("boot") and process.get("boot") == _boot() and process.get("namespace") == _namespace():
        return _born(process.get("pid")) == process.get("born") is not None
    return None


def _boot() -> str | None:
    """This start of this machine; None where there is no /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _namespace() -> str | None:
    """In which this process has its number (pid_namespaces(7)); None where there is no /proc."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _born(pid: object) -> str | None:
    """When a process began, in clock ticks since the start: a number that is used again has another one.

    None for one that is gone, or that has ended and waits for its parent to ask how.
    """
    try:
        state, *facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else facts[18]
    except (OSError, ValueError, IndexError):
        return None
