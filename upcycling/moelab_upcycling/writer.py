"""Writes one file as its bytes are made: beside its place, past the page cache, synced, then renamed.

Buffered writes of what is never read back fill the page cache and cost sixty times the processor time of direct
ones. A thread writes buffers while others are filled. Values come in bursts, an expert's matrix at a time, and so many
buffers take three of those at 7B's width: with two of 16 MB the disk or the processor waited for the other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab.atomic import sync
from moelab.errors import CheckpointError
from moelab_upcycling.dtypes import raw_bytes

BUFFER = 4 << 20  # bytes; a multiple of every block size
BUFFERS = 16  # at most; a small file has fewer
PARTIAL = ".partial"


class ShardWriter:
    """write(...) any number of times, then commit(); or abort(), which leaves nothing behind."""

    def __init__(self, path: Path, size: int) -> None:
        """CheckpointError at once where `size` bytes don't fit."""
        self.path, self.size = path, size
        # A name of its own: a worker of a killed run that still lives can't rename this run's file.
        self.partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        self.written = 0
        self._buffers: Queue[memoryview] = Queue()
        self._full: Queue[tuple[memoryview, int] | None] = Queue()
        self._error: OSError | None = None
        self._descriptor, self._direct = _open(self.partial)
        try:
            _reserve(self._descriptor, size)
        except OSError as error:
            self._remove()
            raise explain(error, path) from error
        for buffer in _page_aligned(min(BUFFERS, 2 + size // BUFFER)):
            self._buffers.put(buffer)
        self._buffer, self._filled = self._buffers.get(), 0
        self._thread = Thread(target=self._drain, daemon=True)
        self._thread.start()

    def write(self, data: bytes | npt.NDArray[Any]) -> None:
        """Append the bytes of a contiguous array."""
        view = memoryview(data) if isinstance(data, bytes) else raw_bytes(data)
        while len(view):
            count = min(len(view), BUFFER - self._filled)
            np.frombuffer(self._buffer, np.uint8, count, self._filled)[:] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == BUFFER:
                self._hand_over()

    def commit(self) -> None:
        """Put the whole file in its place, so that it outlives a power cut."""
        self._hand_over()
        self._full.put(None)
        self._thread.join()
        if self._error is None:
            assert self.written == self.size, (self.written, self.size)
            try:
                os.fsync(self._descriptor)
                self._close()
                os.rename(self.partial, self.path)
                sync(self.path.parent)
                return
            except OSError as error:
                self._error = error
        self._remove()
        raise explain(self._error, self.path) from self._error

    def abort(self) -> None:
        """Give up the file."""
        if self._thread.is_alive():
            self._full.put(None)
            self._thread.join()
        self._remove()

    def _hand_over(self) -> None:
        self._full.put((self._buffer, self._filled))
        self._buffer, self._filled = self._buffers.get(), 0
        if self._error is not None:
            error = self._error
            self.abort()
            raise explain(error, self.path) from error

    def _drain(self) -> None:
        while (item := self._full.get()) is not None:
            buffer, count = item
            if self._error is None and count:
                try:
                    self._write_out(buffer[:count])
                except OSError as error:
                    self._error = error
            self._buffers.put(buffer)

    def _write_out(self, view: memoryview) -> None:
        if self._direct and len(view) % mmap.PAGESIZE:  # the file's end is no whole block
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._direct = False
        start, done = self.written, 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done:], start + done)
        self.written += done
        if not self._direct and hasattr(os, "posix_fadvise"):
            os.fdatasync(self._descriptor)  # only clean pages can be given back
            os.posix_fadvise(self._descriptor, start, done, os.POSIX_FADV_DONTNEED)

    def _remove(self) -> None:
        self._close()
        with contextlib.suppress(FileNotFoundError):
            self.partial.unlink()

    def _close(self) -> None:
        """Once only: the number may be another file's by then."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class NullWriter:
    """Takes the bytes and drops them: `--sink hash`."""

    def write(self, data: bytes | npt.NDArray[Any]) -> None:
        pass

    def commit(self) -> None:
        pass

    def abort(self) -> None:
        pass


def write_text(path: Path, text: str | bytes) -> None:
    """A small file, whole or not at all, and synced."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with open(partial, "xb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise explain(error, path) from error


def explain(error: OSError, path: Path) -> CheckpointError:
    """What the system said, and the cure."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"{path}: no space left; free some and run the same command again: it goes on from the finished shards"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return CheckpointError(f"{path}: can't be written ({error.strerror}); choose another output folder")
    return CheckpointError(f"{path}: can't be written: {error.strerror}; run the same command again to go on")


def _page_aligned(count: int) -> list[memoryview]:
    """Buffers of BUFFER bytes, aligned as direct writing asks.

    In large pages, since the kernel pins each page of what it writes: of 4 kB that costs four times as much, for 4 GB
    as much processor time as hashing them thrice.
    """
    memory = mmap.mmap(-1, count * BUFFER, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    return [view[start : start + BUFFER] for start in range(0, count * BUFFER, BUFFER)]


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether it writes directly, which tmpfs and some network file systems refuse."""
    flags = os.O_CREAT | os.O_WRONLY | os.O_EXCL
    try:
        if hasattr(os, "O_DIRECT"):
            try:
                return os.open(path, flags | os.O_DIRECT, 0o666), True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                with contextlib.suppress(FileNotFoundError):  # created before it was refused
                    path.unlink()
        return os.open(path, flags, 0o666), False
    except OSError as error:
        raise explain(error, path) from error


def _reserve(descriptor: int, size: int) -> None:
    """Claim the blocks, so that a full disk is found before the work and not after it."""
    if size == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
