"""The files of a Debian binary package, one after the other, without unpacking it to disk (deb(5) of dpkg 1.21).

A package is an `ar` archive of `debian-binary`, `control.tar` and `data.tar`, the latter two compressed or not: arpy
reads the first layer, Python's tarfile and decompressors the second, and pyarrow zstd. Nothing is trusted but what is
bounded: the archive is walked once, a file's bytes are read only where its size is allowed, and headers are short.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import IO, Any

from moelab import DataError
from moelab_plugins.data_sources._records import require

ARCHIVE = b"!<arch>\n"  # the other kind of ar archive names files that lie outside it
MOST_MEMBERS = 16  # of the ar archive; dpkg writes three
HEADERS = 1 << 20  # bytes of tar headers before one file
LARGEST_CONTROL = 1 << 20
BUFFERED = 1 << 16  # that tarfile may read ahead
GZIP, XZ, BZIP2, ZSTD = b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh", b"\x28\xb5\x2f\xfd"  # how each begins
CURE = "download it again, or leave it out"


@dataclass(frozen=True)
class Entry:
    """A file of a package; its bytes can be read until the next one is asked for."""

    path: str  # from the root, without / before it
    kind: str  # "file", "folder", "link" or "no regular file"
    size: int
    package: Path
    archive: tarfile.TarFile
    info: tarfile.TarInfo

    def read(self) -> bytes:
        """All of a file; nothing of what is none. Raises DataError where the package ends before it."""
        with _told(self.package):
            content = self.archive.extractfile(self.info) if self.kind == "file" else None
            return b"" if content is None else content.read()


@dataclass(frozen=True)
class Package:
    """What a .deb says of itself."""

    name: str
    version: str


def package_of(file: Path) -> Package:
    """By its control file. Raises DataError for what is no Debian package."""
    with _tar(file, "control.tar") as entries:
        for entry in entries:
            if entry.path == "control" and entry.size <= LARGEST_CONTROL:
                found = HeaderParser().parsestr(entry.read().decode("utf-8", "replace"))
                if found["Package"]:
                    return Package(str(found["Package"]).strip(), str(found["Version"] or "").strip())
                break
    raise DataError(f"data.source: {file} says no name of a package in its control file; {CURE}")


def files_of(file: Path) -> Iterator[Entry]:
    """Of its data.tar, in their order there. Raises DataError where the package can't be read to its end."""
    with _tar(file, "data.tar") as entries:
        yield from entries


@contextmanager
def _tar(file: Path, part: str) -> Iterator[Iterator[Entry]]:
    with _told(file), file.open("rb") as stream:
        if stream.read(len(ARCHIVE)) != ARCHIVE:
            raise DataError(f"data.source: {file} is no Debian package (it begins otherwise); {CURE}")
        stream.seek(0)
        content: Any = _Within(_decompressed(_member(stream, file, part), file))
        with tarfile.open(fileobj=content, mode="r|", bufsize=BUFFERED, encoding="utf-8", errors="replace") as archive:
            yield _entries(file, archive, content)


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """What the libraries raise for a damaged archive, as a DataError that names it."""
    wrong = require("arpy", "debian", f"packages: {file}").ArchiveFormatError
    try:
        yield
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError, wrong) as error:
        raise DataError(f"data.source: {file} can't be read as a Debian package: {error}; {CURE}") from error


def _member(stream: IO[bytes], file: Path, part: str) -> io.BufferedReader:
    """The bytes of data.tar, whatever its ending."""
    whole, archive = file.stat().st_size, require("arpy", "debian", "packages").Archive(fileobj=stream)
    for _ in range(MOST_MEMBERS):
        header = archive.read_next_header()
        if header is None:
            break
        if header.size < 0 or header.file_offset is None or header.file_offset + header.size > whole:
            raise DataError(f"data.source: {file} is cut short, or not whole; {CURE}")
        if header.name and header.name.split(b".")[:2] == part.encode().split(b"."):
            return io.BufferedReader(_Raw(archive.open(header), header.size))
    raise DataError(f"data.source: {file} has no {part}, which every Debian package has; {CURE}")


def _decompressed(member: io.BufferedReader, file: Path) -> Any:
    """A stream of the tar's bytes, by how the member begins: gzip, xz, bzip2, zstd, or the tar itself."""
    begin = member.peek(len(XZ))
    if begin.startswith(ZSTD):
        arrow = require("pyarrow", "parquet", f"packages: {file}, compressed by zstd,")
        return arrow.CompressedInputStream(member, "zstd")
    if begin.startswith(GZIP):
        return gzip.GzipFile(fileobj=member)
    if begin.startswith(XZ):
        return lzma.LZMAFile(member)
    return bz2.BZ2File(member) if begin.startswith(BZIP2) else member


class _Raw(io.RawIOBase):
    """A member of an ar archive as Python's buffers want it: arpy answers `read` alone."""

    def __init__(self, member: Any, size: int) -> None:
        self._member, self._left = member, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._member.read(min(len(buffer), self._left)) if self._left else b""
        buffer[: len(content)] = content
        self._left -= len(content)
        return len(content)


class _Within:
    """A stream of which so many bytes may be read before somebody allows more."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.left = HEADERS + BUFFERED

    def read(self, size: int) -> bytes:
        content: bytes = self._stream.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise tarfile.ReadError(f"more than {HEADERS >> 20} MiB of headers before one file")
        return content


def _entries(file: Path, archive: tarfile.TarFile, content: _Within) -> Iterator[Entry]:
    while (info := archive.next()) is not None:
        setattr(archive, "members", [])  # noqa: B010  (else it keeps all of them; typeshed does not know the name)
        content.left = info.size + HEADERS + BUFFERED
        kind = "link" if info.issym() or info.islnk() else "folder" if info.isdir() else "no regular file"
        path = PurePosixPath("/", info.name).relative_to("/").as_posix()
        yield Entry(path, "file" if info.isreg() else kind, info.size, file, archive, info)
