"""A tokenised corpus as a folder: arrays that are mapped into memory, each file with its checksum.

    cache.json                   what it is: domains, split, tokenizer, counts
    {train,validation}.tokens.npy      [N] uint16 or int32
                      .starts.npy      [n + 1] int64, where documents begin, and the end
                      .domains.npy     [n] uint16, into the domains
                      .tag_NAME.npy    [n] uint16, into the values of a tag
                      .identities.npy  [n] uint64, `data.identity` of the text
                      .names.npy       UTF-8 of all names end to end, .name_ends.npy [n] int64
                      .bytes.npy       [N] bytes each token stands for, where its id does not say it
    manifest.json                bytes and checksum of each file; written last
    tokenizer.json, ...          of the tokenizer, so that the folder can be named as data.tokenizer

N tokens, n documents of a part. Free of torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from moelab.atomic import write_file
from moelab.checksums import checksum_of_span
from moelab.data.account import Account
from moelab.data.corpus import Corpus, TokenStream
from moelab.data.tokenizer import Tokenizer
from moelab.errors import CheckpointError, DataError
from moelab.manifest import MANIFEST, differences, manifest_bytes, read_manifest
from moelab.records import Record
from moelab.safe_files import Reading, map_array, read_object

FORMAT_VERSION = 1
ABOUT, DOMAIN = "cache.json", "domain"
PARTS = ("train", "validation")
READING = Reading(DataError, "make it again with `moelab data`")


class Names(Sequence[str]):
    """Names that lie on disk end to end. text [bytes] uint8, ends [n] int64."""

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self._text, self._ends = text, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        begin = int(self._ends[place - 1]) if place else 0
        return bytes(self._text[begin : int(self._ends[place])]).decode("utf-8", "replace")


@dataclass(frozen=True)
class WrittenDocument:
    """One document of a part, as it goes to disk."""

    ids: bytes  # little-endian, in the cache's type, its end included
    counts: bytes  # the bytes of each, in the cache's type; empty where ids say them
    name: str


def write_part(
    folder: Path, part: str, documents: Iterable[WrittenDocument], types: tuple[np.dtype[Any], np.dtype[Any] | None],
    starts: np.ndarray, identities: np.ndarray, columns: Mapping[str, np.ndarray],
) -> None:  # fmt: skip
    """Write one part's files. types: of ids and of their byte counts, None for no counts. starts [n + 1] int64.

    columns: {name: [n] whole numbers below 65,536}, `domains` and what tags say.
    """
    id_type, count_type = types
    name_ends: list[int] = []
    held = folder / f".{part}.names"
    with (
        _array(folder / f"{part}.tokens.npy", id_type, int(starts[-1])) as tokens,
        _array(folder / f"{part}.bytes.npy", count_type or id_type, int(starts[-1]) if count_type else None) as counts,
        _synced(held) as names,
    ):
        for document in documents:
            tokens.write(document.ids)
            counts.write(document.counts)
            size = names.write(document.name.encode("utf-8", "replace"))
            name_ends.append(size + (name_ends[-1] if name_ends else 0))
    total = name_ends[-1] if name_ends else 0
    with _array(folder / f"{part}.names.npy", np.dtype(np.uint8), total) as file, held.open("rb") as spelled:
        shutil.copyfileobj(spelled, file)
    held.unlink()
    small = {"starts": starts, "identities": identities, "name_ends": np.array(name_ends, np.int64)}
    small |= {name: values.astype(np.uint16) for name, values in columns.items()}
    for name, values in small.items():
        with _array(folder / f"{part}.{name}.npy", values.dtype, len(values)) as file:
            file.write(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes())


def write_about(folder: Path, about: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """What it is, its tokenizer, and, last, the manifest of all files."""
    for name, content in tokenizer.files().items():
        write_file(folder / name, content)
    told = {"format_version": FORMAT_VERSION, "tokenizer": tokenizer.fingerprint, **about}
    write_file(folder / ABOUT, json.dumps(told, indent=1, ensure_ascii=False))
    entries = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            size = path.stat().st_size
            entries[path.name] = {"bytes": size, "checksum": checksum_of_span(file.fileno(), 0, size)}
    write_file(folder / MANIFEST, manifest_bytes(entries))


def read_token_cache(
    folder: Path, tokenizer: Tokenizer, account: Account, *, verify: bool, domain_by: Sequence[str] = (DOMAIN,)
) -> Corpus:
    """The corpus of a folder, mapped. `verify`: every byte is read once and compared with its checksum.

    `domain_by`: what counts as a document's domain, "domain" itself or tags; of several their values, a slash between.
    Raises DataError for what is no such folder, is damaged, was made with another tokenizer, or has no such tag.
    """
    _check_files(folder, verify=verify)
    about = Record(str(folder / ABOUT), read_object(folder / ABOUT, READING), READING)
    if about.integer("format_version") > FORMAT_VERSION:
        READING.refuse(folder / ABOUT, "is of a newer format than this moelab reads")
    if about.text("tokenizer") != tokenizer.fingerprint:
        raise DataError(
            f"data.source: {folder} was made with another tokenizer than data.tokenizer names; write "
            f"data.tokenizer={folder}, which has its own"
        )
    id_bytes = tokenizer.id_bytes()
    if id_bytes is not None:
        id_bytes = id_bytes.copy()
        id_bytes[tokenizer.eos_token_id] = 0
    values = {DOMAIN: about.listed("domains", str)}
    values |= {tag: about.record("tags").listed(tag, str) for tag in about.record("tags", optional=True).values}
    if unknown := [name for name in domain_by if name not in values] or not domain_by:
        named = unknown[0] if isinstance(unknown, list) else ""
        raise DataError(f"data.source.domain_by: {folder} has no tag '{named}'; it has: {', '.join(values)}")
    parts = [_read_part(folder, part, id_bytes) for part in PARTS]
    fingerprint, manifest = about.text("fingerprint"), dict(about.record("manifest").values)
    domains = values[DOMAIN]
    if list(domain_by) != [DOMAIN]:
        found = [_labels(folder, part, domain_by, values) for part in PARTS]
        domains = sorted(set(found[0]) | set(found[1]))
        place = {name: number for number, name in enumerate(domains)}
        parts = [
            replace(stream, document_domain=np.array([place[name] for name in own], np.int64))
            for stream, own in zip(parts, found, strict=True)
        ]
        fingerprint = hashlib.sha256(f"{fingerprint}/{'/'.join(domain_by)}".encode()).hexdigest()
        manifest = _manifest(domains, parts)
    return Corpus(parts[0], parts[1], domains, fingerprint, manifest, account.close())


def _labels(folder: Path, part: str, domain_by: Sequence[str], values: Mapping[str, Sequence[str]]) -> list[str]:
    """What counts as each document's domain."""
    columns = []
    for name in domain_by:
        column = "domains" if name == DOMAIN else f"tag_{name}"
        codes = map_array(folder / f"{part}.{column}.npy", READING)
        if len(codes) and int(codes.max()) >= len(values[name]):
            READING.refuse(folder, f"has values of '{name}' that it does not name")
        columns.append([values[name][code] or "not told" for code in codes.tolist()])
    return ["/".join(several) for several in zip(*columns, strict=True)]


def _manifest(domains: Sequence[str], parts: Sequence[TokenStream]) -> dict[str, Any]:
    """{domain: what it holds}, where domains are other ones than when it was written."""
    told: dict[str, Any] = {}
    for number, name in enumerate(domains):
        mine = [part.document_domain == number for part in parts]
        tokens = [int(np.diff(part.document_starts)[own].sum()) for part, own in zip(parts, mine, strict=True)]
        told[name] = {
            "documents": int(sum(own.sum() for own in mine)), "bytes": None, "tokens": sum(tokens),
            "validation_documents": int(mine[1].sum()), "validation_tokens": tokens[1], "sources": {},
        }  # fmt: skip
    return told


def split_of(folder: Path) -> tuple[float, int]:
    """(share of the documents that is held out, seed of the split) that a cache was made with."""
    split = Record(str(folder / ABOUT), read_object(folder / ABOUT, READING), READING).record("split")
    return split.number("validation_fraction"), split.integer("split_seed")


def _check_files(folder: Path, *, verify: bool) -> None:
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        raise DataError(f"data.source: {error}; make it again with `moelab data`") from error
    if manifest is None or ABOUT not in manifest.files:
        READING.refuse(folder, f"is no tokenised cache (no {MANIFEST} that lists {ABOUT})")
    for name in manifest.files:
        path = folder / name
        if not path.is_file() or path.stat().st_size != manifest.size(name):
            READING.refuse(path, f"is missing, or has not the {manifest.size(name)} bytes that were written")
    if verify:
        for difference in differences(folder, manifest):
            READING.refuse(folder, f"is damaged: {difference}")


def _read_part(folder: Path, part: str, id_bytes: np.ndarray | None) -> TokenStream:
    def array(name: str, kind: str = "iu") -> np.ndarray:
        path = folder / f"{part}.{name}.npy"
        found = map_array(path, READING)
        if found.ndim != 1 or found.dtype.kind not in kind:
            READING.refuse(path, f"holds {found.dtype} of shape {list(found.shape)}, not one row of whole numbers")
        return found

    tokens, starts = array("tokens"), array("starts")
    names = Names(array("names"), array("name_ends"))
    domains, identities = array("domains"), array("identities")
    has_bytes = (folder / f"{part}.bytes.npy").is_file()
    count = len(starts) - 1
    if not (count == len(names) == len(domains) == len(identities) and starts[0] == 0 and starts[-1] == len(tokens)):
        READING.refuse(folder, f"has files of {part} that don't belong together")
    return TokenStream(
        tokens,
        np.asarray(starts, np.int64),
        np.asarray(domains, np.int64),
        names,
        token_bytes=array("bytes") if has_bytes else None,
        id_bytes=id_bytes,
        identities=np.asarray(identities, np.uint64),
    )


@contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _array(path: Path, dtype: np.dtype[Any], count: int | None) -> Iterator[Any]:
    """An .npy file of one dimension whose numbers the caller writes; None: no file, what is written goes nowhere."""
    if count is None:
        with open(os.devnull, "wb") as nowhere:
            yield nowhere
        return
    with _synced(path) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype.newbyteorder("<")), "fortran_order": False,
                  "shape": (count,)}  # fmt: skip
        np.lib.format.write_array_header_2_0(file, header)
        yield file
