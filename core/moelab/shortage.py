"""Memory, disk or another limit of the machine ran out: whoever says so, in whatever words, it is told as one line."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

MEMORY, DISK, FILE_SIZE, THREADS = "memory", "disk", "file size", "threads"
_DISK = {errno.ENOSPC, errno.EDQUOT}
# Torch's CPU allocator, its CUDA allocator, C++ libraries under it, the system. They raise a plain RuntimeError.
_MEMORY_WORDS = (
    "can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory", "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED", "Storage size calculation overflowed",
)  # fmt: skip
_ASKED = re.compile(r"(?:tried to allocate|unable to allocate|failed to allocate) ([\d.]+) *(bytes|[KMGTPE]iB)", re.I)
_UNITS = {"bytes": 1} | {f"{letter}iB": 1 << 10 * (index + 1) for index, letter in enumerate("KMGTPE")}
_OS_ERROR = re.compile(r"os error (\d+)")  # as Rust's libraries say it


@dataclass(frozen=True)
class Shortage:
    """What ran out."""

    of: str  # MEMORY, DISK, FILE_SIZE, THREADS
    asked: int | None = None  # bytes, where the error says so
    file: str | None = None  # that was being written

    def __str__(self) -> str:
        """One line: what was asked for, and the cure."""
        if self.of == MEMORY:
            asked = "" if self.asked is None else f": {size(self.asked)} more were asked for"
            return f"too little memory{asked}"
        if self.of == THREADS:
            return "the system starts no more threads; lower train.threads or OMP_NUM_THREADS, or raise ulimit -u or -v"
        name = "" if self.file is None else f"{self.file}: "
        if self.of == FILE_SIZE:
            return f"{name}the file may not grow further; raise the limit (ulimit -f)"
        return f"{name}no space left on the disk; free some"


def shortage(error: BaseException) -> Shortage | None:
    """What ran out, by an error or what it was raised from; None: nothing did."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        found = _shortage(following)
        if found is not None:
            return found
        following = following.__cause__
    return None


def size(count: float) -> str:
    """Bytes in a unit that leaves few digits: 17.2 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def _shortage(error: BaseException) -> Shortage | None:
    text = str(error)
    if isinstance(error, OSError):
        return _of_number(error.errno, error.filename)
    # torch.OutOfMemoryError, by its name: nobody needs torch to learn that a disk is full.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Shortage(MEMORY, _asked(text))
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return Shortage(THREADS)
    if isinstance(error, RuntimeError) and any(words in text for words in _MEMORY_WORDS):
        return Shortage(MEMORY, _asked(text))
    said = _OS_ERROR.search(text)
    return _of_number(int(said.group(1)), None) if said else None


def _of_number(number: int | None, file: object) -> Shortage | None:
    name = None if file is None else str(file)
    if number in _DISK:
        return Shortage(DISK, file=name)
    if number == errno.EFBIG:
        return Shortage(FILE_SIZE, file=name)
    return Shortage(MEMORY) if number == errno.ENOMEM else None


def _asked(text: str) -> int | None:
    found = _ASKED.search(text)
    if found is None:
        return None
    unit = next((key for key in _UNITS if key.lower() == found.group(2).lower()), "bytes")
    return int(float(found.group(1)) * _UNITS[unit])
