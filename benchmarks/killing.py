"""Kills a process at a chosen one of its file operations, or at a moment, and tells what it had done.

A command runs in a fork of a process that has torch loaded. Counted is what changes the file system below one folder:
opening for writing, each write that reaches the kernel, fsync, rename, exchange, unlink, rmdir, mkdir, truncate,
allocate, chmod. Python's audit events tell most of it, wrapped functions the rest. A `torn` kill does the first half of
a write. What a library of another language writes is not seen: nothing that moelab writes is written by one.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import moelab.atomic

WRITES = ("write", "pwrite")  # what can be torn
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_EVENTS = {
    "os.rename": "rename", "os.remove": "unlink", "os.rmdir": "rmdir", "os.mkdir": "mkdir", "os.truncate": "truncate",
    "os.chmod": "chmod", "os.link": "link", "os.symlink": "symlink",
}  # fmt: skip


class Operation(NamedTuple):
    """One change of the file system: of `path`, relative to the watched folder; a rename's is the new name."""

    kind: str
    path: str


@dataclass(frozen=True)
class Kill:
    """What happens to a process before its operation number `at`, or in the middle of it."""

    at: int
    torn: bool = False
    signals: tuple[int, ...] = (signal.SIGKILL,)


@dataclass(frozen=True)
class Ending:
    """How a command ended: its exit code, -9 where it was killed; what it said; what it did, unless killed."""

    code: int
    said: str
    operations: tuple[Operation, ...] = ()


class Watch:
    """Counts the operations of this process below `folder`, and kills it at one of them. For a fork: no way back."""

    def __init__(self, folder: Path, kill: Kill | None) -> None:
        self.folder, self.kill = str(folder.resolve()), kill
        self.operations: list[Operation] = []

    def install(self) -> None:
        """From here on every operation is seen."""
        sys.addaudithook(self._audit)
        for name, kind in (("fsync", "fsync"), ("fdatasync", "fsync"), ("posix_fallocate", "allocate")):
            setattr(os, name, self._before(kind, getattr(os, name)))
        os.pwrite, os.write = self._tearing("pwrite", os.pwrite), self._tearing("write", os.write)  # type: ignore[assignment]
        builtins.open = io.open = self._open  # type: ignore[assignment]
        swap = moelab.atomic.exchange  # by ctypes, which nobody audits
        moelab.atomic.exchange = lambda one, other: self.meet("exchange", other) or swap(one, other)  # type: ignore[func-returns-value]

    def meet(self, kind: str, path: Any, half: Callable[[], object] | None = None) -> None:
        """An operation is about to happen: die here, in the middle of it by `half`, or go on."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}") if path >= 0 else ""
        text = os.path.abspath(os.fsdecode(path))
        if not text.startswith(self.folder + os.sep):
            return
        number = len(self.operations)
        self.operations.append(Operation(kind, text[len(self.folder) + 1 :]))
        if self.kill is None or number != self.kill.at:
            return
        kill, self.kill = self.kill, None
        if kill.torn and half is not None:
            with contextlib.suppress(OSError):
                half()
        for number in kill.signals:
            os.kill(os.getpid(), number)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags is not None and flags & _WRITING and not isinstance(path, int):
                self.meet("open", path)
        elif event in _EVENTS:
            path, descriptor = arguments[0], -1
            if event in ("os.rename", "os.link", "os.symlink"):
                path = arguments[1]
            elif event in ("os.remove", "os.rmdir"):
                descriptor = arguments[1]
            if descriptor != -1:
                path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), os.fsdecode(path))
            self.meet(_EVENTS[event], path)

    def _before(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(descriptor: int, *rest: Any) -> Any:
            self.meet(kind, descriptor)
            return function(descriptor, *rest)

        return watched

    def _tearing(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(descriptor: int, data: Any, *rest: Any) -> Any:
            half = memoryview(data)[: len(memoryview(data)) // 2 // 4096 * 4096 or len(memoryview(data)) // 2]
            self.meet(kind, descriptor, lambda: function(descriptor, half, *rest))
            return function(descriptor, data, *rest)

        return watched

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        """The built-in, of which every write that leaves Python's buffer is seen."""
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return _plain_open(file, mode, buffering, *rest, **options)
        raw = _Raw(self, file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        text = dict(zip(("encoding", "errors", "newline"), rest, strict=False)) | options
        return io.TextIOWrapper(buffered, **text, line_buffering=buffering == 1)


_plain_open = io.open


class _Raw(io.FileIO):
    def __init__(self, watch: Watch, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self._watch = watch

    def write(self, data: Any) -> int:
        view, plain = memoryview(data), super().write
        self._watch.meet("write", self.fileno(), lambda: plain(view[: len(view) // 2]))
        return plain(data)


def fork(command: Callable[[], int], folder: Path, kill: Kill | None = None) -> tuple[int, Any]:
    """Start `command` in a fork that is watched below `folder`; -> (process id, the open file of what it says)."""
    report = tempfile.TemporaryFile()  # noqa: SIM115 - `wait` closes it
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process, report
    code = 70
    try:
        said = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - the process ends here
        for number in (1, 2):
            os.dup2(said.fileno(), number)
        sys.modules["__main__"] = ModuleType("__main__")  # a process that it spawns need not import torch
        watch = Watch(folder, kill)
        watch.install()
        try:
            code = command()
        except BaseException:
            traceback.print_exc()
            code = 71
        sys.stdout.flush()
        sys.stderr.flush()
        said.seek(0)
        report.write(json.dumps([said.read()[-2000:], watch.operations]).encode())
        report.flush()
    finally:
        os._exit(code)


def wait(process: int, report: Any) -> Ending:
    """Until it ends."""
    _, status = os.waitpid(process, 0)
    report.seek(0)
    text = report.read()
    report.close()
    said, operations = json.loads(text) if text else ("", [])
    return Ending(os.waitstatus_to_exitcode(status), said, tuple(Operation(*one) for one in operations))


def run(command: Callable[[], int], folder: Path, kill: Kill | None = None) -> Ending:
    """`command` to its end, or to where it is killed."""
    return wait(*fork(command, folder, kill))
