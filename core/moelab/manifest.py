"""manifest.json of a checkpoint: what was written, so that one bit of another value is noticed.

For each file its bytes and checksum; a file of tensors in parts, the header and each tensor, so that what differs has
a name. The parts cover the file without a gap. The manifest closes with the checksum of its own text, which can be
spelled in one way only, so that it is covered too. It is written last. Any number of files, and of files of tensors.

    {"format_version": 1, "algorithm": "xxh3-128",
     "files": {"config.yaml": {"bytes": 1834, "checksum": "..."},
               "model.safetensors": {"bytes": 5120, "header": {"bytes": 512, "checksum": "..."},
                                     "tensors": {"norm.weight": {"dtype": "F32", "shape": [64], "offset": 512,
                                                                 "bytes": 256, "checksum": "..."}}}},
     "checksum": "..."}

`offset` counts from the file's first byte. A tensor that several processes wrote lies in several files, some of its
rows (axis 0) in each: there "rows": {"first": 12, "of": 48} stands beside its shape, which is that of its part. It
finds damage, not forgery. Free of torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.checksums import ALGORITHM, checksum, checksum_of_span
from moelab.errors import CheckpointError
from moelab.records import Record
from moelab.safe_files import Reading, an_object, parse_json, read_bytes

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
CHANGED = "was changed after it was written"
_CHECKSUM = "checksum"
_READING = Reading(CheckpointError, "use an earlier checkpoint, or restore it")
_LARGEST = 1 << 62  # bytes of a file or an offset in one: more than any file system takes

Progress = Callable[[int], None]  # bytes read since the last call
Share = tuple[int, int]  # (which, of how many) of a folder's bytes
WHOLE: Share = (0, 1)


@dataclass(frozen=True)
class Part:
    """A span of a file that was written as one."""

    name: str  # of a tensor; empty: the whole file, or its header
    offset: int
    nbytes: int
    checksum: str
    rows: tuple[int, int] | None = None  # (the first one, of how many) of a tensor whose other rows lie in other files


@dataclass(frozen=True)
class Manifest:
    """What a folder held when it was written: {file name: its parts, in their order}."""

    files: Mapping[str, tuple[Part, ...]]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in self.files.values() for part in parts)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return sum(part.nbytes for part in self.files[name])

    @property
    def tensors(self) -> int:
        return sum(bool(part.name) for parts in self.files.values() for part in parts)


def plain_entry(content: bytes) -> dict[str, Any]:
    """What the manifest says of a file that is no file of tensors."""
    return {"bytes": len(content), "checksum": checksum(content)}


def manifest_bytes(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The content of manifest.json: {file name: its entry}."""
    return _spelled({"format_version": FORMAT_VERSION, "algorithm": ALGORITHM, "files": dict(files)})


def read_manifest(folder: Path) -> Manifest | None:
    """None where the folder has none. Raises CheckpointError where it was changed, or is no manifest."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    content = read_bytes(path, _READING)
    said = an_object(parse_json(content, path, _READING), path, _READING)
    if _spelled({key: value for key, value in said.items() if key != _CHECKSUM}) != content:
        _READING.refuse(path, CHANGED)
    record = Record(str(path), said, _READING)
    if record.integer("format_version") > FORMAT_VERSION or record.text("algorithm") != ALGORITHM:
        _READING.refuse(path, "is of another format than this moelab reads")
    return Manifest({name: tuple(_parts(name, entry)) for name, entry in record.record("files").records()})


def fingerprint(folder: Path) -> str | None:
    """The checksum of its manifest, and so of all that it held when it was written; None where it has none."""
    path = folder / MANIFEST
    return checksum(read_bytes(path, _READING)) if path.is_file() else None


def differences(
    folder: Path, manifest: Manifest, progress: Progress = lambda nbytes: None, share: Share = WHOLE
) -> Iterator[str]:
    """ "FILE: what is wrong with it" of each difference, the tensor named; reads every byte of the share once."""
    for name, parts in _shared_out(manifest, share).items():
        try:
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            yield f"{name}: is missing"
            continue
        except OSError as error:
            yield f"{name}: can't be read: {error.strerror}"
            continue
        try:
            yield from _differences_of_file(name, descriptor, parts, manifest.size(name), progress)
        except OSError as error:  # a bad block, or a folder of this name
            yield f"{name}: can't be read: {error.strerror}"
        finally:
            os.close(descriptor)


def unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """Names of what lies in the folder and is not of it."""
    return sorted({path.name for path in folder.iterdir()} - manifest.files.keys() - {MANIFEST})


def _shared_out(manifest: Manifest, share: Share) -> dict[str, list[Part]]:
    """{file: its parts that begin in this share}: runs of the folder's bytes, as long as each other."""
    which, of = share
    found: dict[str, list[Part]] = {}
    before, total = 0, max(manifest.nbytes, 1)
    for name, parts in manifest.files.items():
        for part in parts:
            if min(before * of // total, of - 1) == which:
                found.setdefault(name, []).append(part)
            before += part.nbytes
    return found


def _differences_of_file(
    name: str, descriptor: int, parts: Sequence[Part], wanted: int, progress: Progress
) -> Iterator[str]:
    found = os.fstat(descriptor).st_size
    if found != wanted:
        yield f"{name}: has {found} bytes, {wanted} were written"
        return
    for part in parts:
        if checksum_of_span(descriptor, part.offset, part.nbytes) != part.checksum:
            place = part.name or (f"its header (the first {part.nbytes} bytes)" if part.nbytes < wanted else "")
            yield f"{name}: {place} {CHANGED}" if place else f"{name}: {CHANGED}"
        progress(part.nbytes)


def _parts(name: str, entry: Record) -> Iterator[Part]:
    """In the file's order; refuses parts that leave bytes of it out, and names of files elsewhere."""
    if Path(name).name != name or name in ("", ".", "..", MANIFEST):
        entry.reading.refuse(entry.where, "does not name another file of this folder")
    total = entry.integer("bytes", least=0, most=_LARGEST)
    if "tensors" not in entry:
        yield Part("", 0, total, entry.text(_CHECKSUM))
        return
    header = entry.record("header")
    end = header.integer("bytes", least=0, most=total)
    yield Part("", 0, end, header.text(_CHECKSUM))
    tensors = [
        Part(tensor, said.integer("offset"), said.integer("bytes", least=0), said.text(_CHECKSUM), _rows(said))
        for tensor, said in entry.record("tensors").records()
    ]
    for part in sorted(tensors, key=lambda part: (part.offset, part.nbytes)):
        if part.offset != end:
            entry.reading.refuse(entry.where, "leaves bytes of its file out, or counts them twice")
        end += part.nbytes
        yield part
    if end != total:
        entry.reading.refuse(entry.where, "leaves bytes of its file out, or counts them twice")


def _rows(said: Record) -> tuple[int, int] | None:
    if "rows" not in said:
        return None
    rows = said.record("rows")
    of = rows.integer("of", least=1, most=_LARGEST)
    return rows.integer("first", least=0, most=of - 1), of


def _spelled(content: Mapping[str, Any]) -> bytes:
    """With its own checksum at the end, in the one way in which it is written."""
    body = json.dumps(content, indent=1, ensure_ascii=True)
    return (json.dumps({**content, _CHECKSUM: checksum(body.encode())}, indent=1) + "\n").encode()
