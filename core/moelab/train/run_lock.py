"""One writer to a run folder: a lock that says who holds it, and notices when the folder is taken away.

The kernel's lock on RUN/.lock decides; it ends with its process, whatever became of it, and is seen from other
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

from moelab.errors import RunFailure, UserError
from moelab.safe_files import Reading, an_object, parse_json

LOCK = ".lock"
BEAT_SECONDS = 600.0  # a holder touches the file at least at each log, evaluation and checkpoint
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class RunLock:
    """Held from before the first write of a run to after its last; made by `hold`."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder, self._descriptor = folder, descriptor
        self._last_beat = time.monotonic()

    def check(self) -> None:
        """Raise RunFailure when the folder is gone, moved or replaced: nothing more may be written there."""
        if not _is_there(self.folder, self._descriptor):
            raise RunFailure(
                f"{self.folder}: the run folder was deleted, moved or taken by another run meanwhile; this run ends "
                "and writes nothing more"
            )
        if time.monotonic() - self._last_beat > BEAT_SECONDS / 10:
            os.utime(self._descriptor)
            self._last_beat = time.monotonic()


@contextmanager
def hold(folder: Path) -> Iterator[RunLock]:
    """Make `folder` if need be and lock it. Raises UserError naming the process that holds it."""
    made = not folder.exists()
    descriptor = _open(folder)
    try:
        yield RunLock(folder, descriptor)
    finally:
        with contextlib.suppress(OSError):  # gone, or no longer empty: both are right
            if _is_there(folder, descriptor):
                (folder / LOCK).unlink()
            if made:
                folder.rmdir()  # refused before its first file was written
        os.close(descriptor)


def _open(folder: Path) -> int:
    """A locked descriptor of the file that lies there; a holder may end, and remove it, before it is locked."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise UserError(f"run_dir: {folder} can't be written: {error.strerror}; choose another run_dir") from error
        try:
            _take(folder, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if _is_there(folder, descriptor):
            return descriptor
        os.close(descriptor)


def _is_there(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK))
    except FileNotFoundError:
        return False


def _take(folder: Path, descriptor: int) -> None:
    holder = _read(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError as error:
        free = error.errno in _UNSUPPORTED and not _alive(holder, os.fstat(descriptor).st_mtime)
    if not free:
        raise UserError(
            f"run_dir: {folder} is being written by process {holder.get('pid', '?')} on {holder.get('host', '?')}, "
            f"since {holder.get('started', '?')}; wait for it, stop it, or choose another run_dir"
        )
    text = json.dumps(_self()).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text, 0)


def _read(descriptor: int) -> dict[str, Any]:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise UserError(f"run_dir: {LOCK} in it is no regular file; remove it, or choose another run_dir")
    try:
        return an_object(parse_json(os.pread(descriptor, 4096, 0), LOCK, Reading()), LOCK, Reading())
    except UserError:  # empty: just made, or its maker was killed before it wrote
        return {}


def _self() -> dict[str, Any]:
    started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    pid = os.getpid()
    return {
        "host": socket.gethostname(), "boot": _boot(), "namespace": _namespace(), "pid": pid, "born": _born(pid),
        "started": started,
    }  # fmt: skip


def _alive(holder: dict[str, Any], touched: float) -> bool:
    if not holder:
        return False
    if holder.get("boot") and holder.get("boot") == _boot() and holder.get("namespace") == _namespace():
        return _born(holder.get("pid")) == holder.get("born") is not None
    return time.time() - touched < BEAT_SECONDS


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
    """When a process began, in clock ticks since the start: a number that is used again has another one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
