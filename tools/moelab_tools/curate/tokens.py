"""What is kept, tokenised: each piece by a process of its own, then all of them as one corpus on disk.

A piece's tokens are written whole or not at all beside its text, so a killed run loses the pieces that were being made.
The corpus is that of `moelab.build_corpus` on the same documents: the same split, order, names and fingerprint.

n documents, N tokens, a piece's or all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moelab.atomic import write_file
from moelab.data.account import Account as Causes
from moelab.data.corpus import encoded
from moelab.data.special_tokens import spelling
from moelab.data.split import held_out
from moelab.data.tagging import RESERVED
from moelab.data.token_cache import WrittenDocument, write_about, write_part
from moelab.data.tokenizer import Tokenizer, load_tokenizer
from moelab.errors import DataError
from moelab.safe_files import read_bytes, read_object
from moelab_tools.curate.account import Account
from moelab_tools.curate.declaration import TokensConfig
from moelab_tools.curate.duplicates import KEPT, LARGEST, SIMILAR, Pieces
from moelab_tools.curate.filtering import READING, document_of

COUNT_TYPE = np.dtype("<u4")  # of bytes that a token stands for: 64 KB and more where a tokenizer drops white space


@dataclass(frozen=True)
class Made:
    """What became of the tokens, for the last lines of the command."""

    train: int
    validation: int


def cut(
    pieces: Pieces, what: np.ndarray, config: TokensConfig, account: Account, causes: Causes, *, near: float | None
) -> np.ndarray:
    """[n] bool over all documents that the filters kept: which are held out.

    Unless near copies of that similarity went already (`near`), a training document that is one of held-out text goes:
    `what` and the account say so. Raises DataError where nothing is left for one of the two.
    """
    names, domain = pieces.domains()
    identities, alive = pieces.identities(), what == KEPT
    out = np.zeros(len(what), bool)
    out[alive] = held_out(
        identities[alive], domain[alive], names, config.validation_fraction, config.split_seed, causes
    )
    if near is None or near > SIMILAR:
        pieces.drop_leaks(what, out, account)
    alive = what == KEPT
    if not (alive & out).any() or not (alive & ~out).any():
        raise DataError(
            f"tokens: nothing to {'train on' if (alive & out).any() and alive.sum() > 1 else 'hold out'}: "
            f"{int(alive.sum())} documents are left; give more text, or another tokens.validation_fraction"
        )
    return out


def tokenise(pieces: Pieces, what: np.ndarray, config: TokensConfig, settings: str, pool: Executor | None) -> None:
    """The ids of every piece's kept documents, beside its text. `settings`: the digest under which pieces were made."""
    assert config.tokenizer is not None
    fingerprint = load_tokenizer(config.tokenizer).fingerprint
    waiting = []
    for number, mine in pieces.shares(what):
        kept = np.flatnonzero(mine == KEPT)
        digest = hashlib.sha256(f"{settings}/{pieces.input_digest(number)}/{fingerprint}".encode() + kept.tobytes())
        if _is_done(pieces.folder, number, digest.hexdigest()):
            continue
        job = (config.tokenizer, pieces, number, kept, digest.hexdigest())
        if pool is None:
            _make(*job)
        else:
            waiting.append(pool.submit(_make, *job))
    for done in waiting:
        done.result()


@cache
def _tokenizer(spec: str) -> Tokenizer:
    """Loaded once in each process."""
    return load_tokenizer(spec)


def _is_done(folder: Path, number: int, digest: str) -> bool:
    path = folder / f"{number:06d}.ids.json"
    return path.is_file() and read_object(path, READING).get("digest") == digest


def _make(spec: str, pieces: Pieces, number: int, kept: np.ndarray, digest: str) -> None:
    """Writes NUMBER.ids, .counts where ids don't say the bytes, and, when these are whole, NUMBER.ids.json."""
    tokenizer = _tokenizer(spec)
    id_bytes, special = tokenizer.id_bytes(), spelling(tokenizer.special_tokens)
    rows = list(pieces.rows_of(number))
    documents = [document_of(rows[place]) for place in kept.tolist()]
    ids, counts, lengths, spelled = [], [], [], list[str]()
    end, said = np.array([tokenizer.eos_token_id], np.int32), True
    for document, (own, own_counts) in encoded(documents, tokenizer):
        spelled += [
            f"{document.domain}/{document.name}: '{one}'"
            for one in (special.findall(document.text) if document.messages is None else ())
        ]
        said = said and id_bytes is not None and np.array_equal(id_bytes[own], own_counts)
        ids += [own, end]
        counts += [own_counts, np.zeros(1, COUNT_TYPE)]
        lengths.append(len(own) + 1)
    id_type = type_of(tokenizer)
    write_file(
        pieces.folder / f"{number:06d}.ids", np.concatenate([*ids, np.zeros(0, np.int32)]).astype(id_type).tobytes()
    )
    if not said:
        flat = np.concatenate([*counts, np.zeros(0, COUNT_TYPE)]).astype(COUNT_TYPE)
        write_file(pieces.folder / f"{number:06d}.counts", flat.tobytes())
    told = {
        "digest": digest,
        "counts": not said,
        "lengths": lengths,
        "names": [document.name for document in documents],
        "sizes": [len(document.text.encode("utf-8", "replace")) for document in documents],
        "digests": [document.digest.hex() for document in documents],
        "spelled": len(spelled),
        "spelled_first": spelled[:1],
        "tags": {
            key: [rows[place][key] for place in kept.tolist()]
            for key in (rows[0] if rows else ())
            if key not in RESERVED
        },
    }
    write_file(pieces.folder / f"{number:06d}.ids.json", json.dumps(told))


def type_of(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest of the types that ids are kept in."""
    return np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<i4")


@dataclass
class Laid:
    """All pieces' kept documents end to end in two files, which are read by place: [n] each."""

    lengths: np.ndarray  # int64, tokens
    sizes: np.ndarray  # int64, bytes of text
    digests: np.ndarray  # S32
    name_ends: np.ndarray  # int64
    has_counts: bool
    spelled: int
    spelled_first: str
    tags: dict[str, np.ndarray]  # object: texts


def _lay(pieces: Pieces, tokenizer: Tokenizer) -> Laid:
    """One file each of ids, counts and names, so that documents can be read in any order."""
    told = [read_object(pieces.folder / f"{number:06d}.ids.json", READING) for number in range(pieces.count)]
    has_counts, id_bytes = any(one["counts"] for one in told), tokenizer.id_bytes()
    name_ends, at = [], 0
    with (
        (pieces.folder / "all.ids").open("wb") as ids,
        (pieces.folder / "all.counts").open("wb") as counts,
        (pieces.folder / "all.names").open("wb") as names,
    ):
        for number, one in enumerate(told):
            content = read_bytes(pieces.folder / f"{number:06d}.ids", READING, LARGEST)
            ids.write(content)
            if one["counts"]:
                counts.write(read_bytes(pieces.folder / f"{number:06d}.counts", READING, LARGEST))
            elif has_counts:
                assert id_bytes is not None
                own = id_bytes[np.frombuffer(content, type_of(tokenizer))].astype(COUNT_TYPE)
                own[np.cumsum(np.array(one["lengths"], np.int64)) - 1] = 0
                counts.write(own.tobytes())
            for name in one["names"]:
                at += names.write(name.encode("utf-8", "replace"))
                name_ends.append(at)
            one["names"] = None  # the largest part of it
    return Laid(
        np.array([length for one in told for length in one["lengths"]], np.int64),
        np.array([size for one in told for size in one["sizes"]], np.int64),
        np.array([bytes.fromhex(digest) for one in told for digest in one["digests"]], "V32"),
        np.array(name_ends, np.int64),
        has_counts,
        sum(one["spelled"] for one in told),
        next((first for one in told for first in one["spelled_first"]), ""),
        {tag: _texts(told, tag) for tag in sorted({tag for one in told for tag in one["tags"]})},
    )


def _texts(told: Sequence[Mapping[str, Any]], tag: str) -> np.ndarray:
    """The values of a tag, of all documents in their order."""
    return np.array([value for one in told if one["lengths"] for value in one["tags"][tag]], object)


def write_cache(
    pieces: Pieces, what: np.ndarray, out: np.ndarray, config: TokensConfig, account: Account, causes: Causes,
    folder: Path,
) -> Made:  # fmt: skip
    """OUTPUT/tokens, of what `tokenise` made. out [n] bool: held out."""
    assert config.tokenizer is not None
    tokenizer = load_tokenizer(config.tokenizer)
    folder.mkdir()
    laid = _lay(pieces, tokenizer)
    if laid.spelled:
        causes.add(
            "special tokens spelled in texts, read as text and not as control tokens", laid.spelled_first,
            "where they were meant to end a document, cut there, or take them out", laid.spelled,
        )  # fmt: skip
    alive = what == KEPT
    names, domain = pieces.domains()
    present = np.unique(domain[alive])
    domain = np.searchsorted(present, domain[alive])
    domains, identities, held = [names[number] for number in present], pieces.identities()[alive], out[alive]
    order = np.lexsort((laid.digests.view(">u8").reshape(-1, 4)[:, 0], identities))  # as build_corpus, equal ones apart
    validation = order[held[order]]
    parts = {"train": order[~held[order]], "validation": validation[np.argsort(domain[validation], kind="stable")]}
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    types = (type_of(tokenizer), COUNT_TYPE if laid.has_counts else None)
    values = {tag: sorted(set(texts)) for tag, texts in laid.tags.items()}
    codes = {tag: np.searchsorted(values[tag], laid.tags[tag].astype(str)) for tag in values}
    with _Reader(pieces.folder, laid, types, identities) as reader:
        for part, chosen in parts.items():
            starts = np.concatenate([[0], np.cumsum(laid.lengths[chosen])]).astype(np.int64)
            columns = {"domains": domain[chosen]} | {f"tag_{tag}": codes[tag][chosen] for tag in codes}
            write_part(folder, part, reader.documents(chosen), types, starts, identities[chosen], columns)
            digest.update(len(chosen).to_bytes(8, "little") + laid.digests[chosen].tobytes())
    about = {
        "fingerprint": digest.hexdigest(),
        "domains": domains,
        "tags": values,
        "split": {"validation_fraction": config.validation_fraction, "split_seed": config.split_seed},
        "manifest": _manifest(domains, domain, held, laid, account),
    }
    write_about(folder, about, tokenizer)
    return Made(*(int(laid.lengths[chosen].sum()) for chosen in parts.values()))


class _Reader:
    """Documents of `Laid`, in whatever order."""

    def __init__(self, folder: Path, laid: Laid, types: Any, identities: np.ndarray) -> None:
        self._folder, self._laid, self._types, self._identities = folder, laid, types, identities
        self._ends = np.cumsum(laid.lengths)
        self._files: list[BinaryIO] = []
        self._taken = self._twice()
        self._given: dict[str, int] = {}

    def __enter__(self) -> _Reader:
        self._files = [(self._folder / f"all.{name}").open("rb") for name in ("ids", "counts", "names")]
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def documents(self, chosen: np.ndarray) -> Iterator[WrittenDocument]:
        """chosen [m] int64 -> those documents, in that order."""
        id_size, count_size = self._types[0].itemsize, COUNT_TYPE.itemsize
        for place in chosen.tolist():
            begin, length = int(self._ends[place] - self._laid.lengths[place]), int(self._laid.lengths[place])
            counts = self._read(1, begin * count_size, length * count_size) if self._types[1] else b""
            yield WrittenDocument(self._read(0, begin * id_size, length * id_size), counts, self._name(place))

    def _read(self, which: int, offset: int, size: int) -> bytes:
        found = os.pread(self._files[which].fileno(), size, offset)
        assert len(found) == size, (len(found), size)
        return found

    def _spelled(self, place: int) -> bytes:
        begin = int(self._laid.name_ends[place - 1]) if place else 0
        return self._read(2, begin, int(self._laid.name_ends[place]) - begin)

    def _name(self, place: int) -> str:
        """As `build_corpus` tells documents of one name apart."""
        name = self._spelled(place).decode("utf-8", "replace")
        if self._taken[place]:
            name = f"{name}~{int(self._identities[place]):016x}"
            self._given[name] = self._given.get(name, 0) + 1
            name += f"~{self._given[name]}" if self._given[name] > 1 else ""
        return name

    def _twice(self) -> np.ndarray:
        """[n] bool: whose name another one has too."""
        ends, hashed = self._laid.name_ends, np.zeros(len(self._laid.name_ends), np.uint64)
        with (self._folder / "all.names").open("rb") as names:
            for place, end in enumerate(ends.tolist()):
                begin = int(ends[place - 1]) if place else 0
                own = hashlib.blake2b(names.read(end - begin), digest_size=8).digest()
                hashed[place] = int.from_bytes(own, "little")
        _, which, count = np.unique(hashed, return_inverse=True, return_counts=True)
        return np.asarray(count[which] > 1)


def _manifest(
    domains: list[str], domain: np.ndarray, held: np.ndarray, laid: Laid, account: Account
) -> dict[str, dict[str, Any]]:
    """{domain: what it holds}, as a corpus tells it; `duplicates` counts what left as a copy."""
    return {
        name: {
            "documents": int((domain == number).sum()),
            "bytes": int(laid.sizes[domain == number].sum()),
            "tokens": int(laid.lengths[domain == number].sum()),
            "validation_documents": int((held & (domain == number)).sum()),
            "validation_tokens": int(laid.lengths[held & (domain == number)].sum()),
            "duplicates": account.copies(name),
            "sources": {},
        }
        for number, name in enumerate(domains)
    }
