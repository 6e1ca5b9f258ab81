"""All pieces together: which documents are copies of one before them, and the text that is left."""

from __future__ import annotations

import errno
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moelab.data.covering import Cover, complex_and_diverse
from moelab.data.minhash import ROOM, SIZE, near_copies, release
from moelab.data.token_cache import DOMAIN
from moelab.errors import DataError
from moelab.safe_files import parse_json, read_bytes, read_object
from moelab_tools.curate.account import (
    EXACT,
    LEAKS,
    NEAR,
    NO_TAGS,
    NOT_CHOSEN,
    SAME_SHINGLES,
    SAME_TEXT,
    SELECT,
    SPLIT,
    Account,
)
from moelab_tools.curate.declaration import DeduplicateConfig
from moelab_tools.curate.filtering import READING, ZIPPED

LARGEST = 1 << 30  # bytes of numbers of one piece
SHARD = 256_000_000  # bytes of text in a file of the output
KEPT, EXACT_COPY, NEAR_COPY, LEAK, PASSED_OVER, UNTAGGED = range(6)
WHY = {
    EXACT_COPY: (EXACT, SAME_TEXT),
    NEAR_COPY: (NEAR, SAME_SHINGLES),
    LEAK: (SPLIT, LEAKS),
    PASSED_OVER: (SELECT, NOT_CHOSEN),
    UNTAGGED: (SELECT, NO_TAGS),
}
UNTOLD = ("", "no")  # values by which a tagger says that there is nothing to tell
SIMILAR = 0.75  # estimated similarity from which no training document stands beside a held-out one


@dataclass(frozen=True)
class Pieces:
    """The folder of the finished pieces."""

    folder: Path
    count: int

    def account(self) -> Account:
        """Of all pieces, in their order."""
        total = Account()
        for number in range(self.count):
            total.add(Account.from_json(self._told(number)["account"]))
        return total

    def copies(self, config: DeduplicateConfig, account: Account) -> np.ndarray:
        """[n] int8 over all kept documents: KEPT, EXACT_COPY or NEAR_COPY; the account says so too."""
        identities = self.identities()
        what = np.full(len(identities), KEPT, np.int8)
        if config.exact and len(identities):
            _, first = np.unique(identities, return_index=True)
            again = np.ones(len(identities), bool)
            again[first] = False
            what[again] = EXACT_COPY
        if config.near is not None and len(identities):
            signatures = self._signatures(len(identities))
            what[near_copies(signatures, config.near, what == KEPT)] = NEAR_COPY
        self._take_back(what, what != KEPT, account)
        return what

    def select(self, what: np.ndarray, count: int, by: Sequence[str], account: Account) -> Cover:
        """Marks what is not among the `count` documents chosen by these tags, and says so in the account.

        Of documents with equally many tags the one with the lowest identity is first: the order of reading is no
        matter. Raises DataError where no document has any.
        """
        alive = np.flatnonzero(what == KEPT)
        kinds, kind_of = self._kinds(by)
        kind_of = kind_of[alive]
        cover = complex_and_diverse((kinds[kind] for kind in kind_of.tolist()), count, self.identities()[alive])
        if not cover.chosen:
            raise DataError(f"select: none of {len(alive):,} documents has a tag of {', '.join(by)}; select by others")
        bare = np.array([not kind for kind in kinds])
        mine = np.where(bare[kind_of], UNTAGGED, PASSED_OVER).astype(what.dtype)
        mine[cover.chosen] = KEPT
        what[alive] = mine
        self._take_back(what, np.isin(what, (PASSED_OVER, UNTAGGED)), account)
        return cover

    def _kinds(self, by: Sequence[str]) -> tuple[list[frozenset[str]], np.ndarray]:
        """(different sets of tags, [n] int32 into them) of all kept documents."""
        known: dict[frozenset[str], int] = {}
        parts = []
        for number in range(self.count):
            told = self._told(number)
            names, kinds, of = (told["tags"][key] for key in ("names", "kinds", "of"))
            for domain, kind in zip(told["domains"], of, strict=True):
                values = dict(zip(names, kinds[kind], strict=True), **{DOMAIN: domain})
                own = frozenset(f"{name}={values[name]}" for name in by if values[name] not in UNTOLD)
                parts.append(known.setdefault(own, len(known)))
        return list(known), np.array(parts, np.int32)

    def drop_leaks(self, what: np.ndarray, held_out: np.ndarray, account: Account) -> None:
        """Marks training documents that are near copies of held-out ones. held_out [n] bool."""
        index = np.concatenate([np.flatnonzero((what == KEPT) & held_out), np.flatnonzero((what == KEPT) & ~held_out)])
        first_of_training = int((held_out & (what == KEPT)).sum())
        if not len(index):  # no file of no bytes can be mapped
            return
        signatures = self._signatures(len(what))
        ordered = _on_disk(self.folder / "ordered.u32", len(index))
        for begin in range(0, len(index), ROOM):
            ordered[begin : begin + ROOM] = signatures[index[begin : begin + ROOM]]
            release(signatures)
            release(ordered)
        repeats = near_copies(ordered, SIMILAR, np.ones(len(index), bool), among=first_of_training)
        leaks = np.zeros(len(what), bool)
        leaks[index[first_of_training:][repeats[first_of_training:]]] = True
        what[leaks] = LEAK
        self._take_back(what, leaks, account)

    def identities(self) -> np.ndarray:
        """[n] uint64 of all kept documents."""
        return np.concatenate([self._numbers(number, "identities", np.uint64) for number in range(self.count)])

    def domains(self) -> tuple[list[str], np.ndarray]:
        """(sorted names, [n] int64 into them) of all kept documents."""
        found = [name for number in range(self.count) for name in self._told(number)["domains"]]
        names = sorted(set(found))
        place = {name: at for at, name in enumerate(names)}
        return names, np.array([place[name] for name in found], np.int64)

    def shares(self, what: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(piece, its part of `what`)."""
        begin = 0
        for number in range(self.count):
            end = begin + len(self._told(number)["domains"])
            yield number, what[begin:end]
            begin = end

    def input_digest(self, number: int) -> str:
        """Of the documents that a piece was made of."""
        return str(self._told(number)["input"])

    def rows_of(self, number: int) -> Iterator[dict[str, Any]]:
        """The kept documents of a piece."""
        return self._lines(f"{number:06d}.jsonl.gz")

    def _told(self, number: int) -> dict[str, Any]:
        return read_object(self.folder / f"{number:06d}.json", READING)

    def _take_back(self, what: np.ndarray, chosen: np.ndarray, account: Account) -> None:
        if not chosen.any():
            return
        for one, mine, row in zip(what, chosen, self._rows(), strict=True):
            if mine:
                stage, reason = WHY[int(one)]
                account.take_back(stage, reason, row)

    def write(self, folder: Path, what: np.ndarray) -> None:
        """The kept documents as JSON lines, in files of some hundred megabytes."""
        folder.mkdir()
        writer = _Shards(folder)
        for one, row in zip(what, self._rows(), strict=True):
            if one == KEPT:
                writer.add(row)
        writer.close()

    def write_rejected(self, folder: Path, what: np.ndarray) -> None:
        """What was left out, with stage and reason: by the filters, then the copies."""
        folder.mkdir()
        writer = _Shards(folder)
        for number in range(self.count):
            for row in self._lines(f"{number:06d}.rejected.jsonl.gz"):
                writer.add(row)
        for one, row in zip(what, self._rows(), strict=True):
            if one != KEPT:
                stage, reason = WHY[int(one)]
                writer.add({**row, "stage": stage, "reason": reason, "measured": ""})
        writer.close()

    def _signatures(self, count: int) -> np.ndarray:
        """[n, H] uint32 in one file, so that they need not be in memory."""
        held = _on_disk(self.folder / "signatures.u32", count)
        begin = 0
        for number in range(self.count):
            found = self._numbers(number, "signatures", np.uint32).reshape(-1, SIZE)
            held[begin : begin + len(found)] = found
            begin += len(found)
            release(held)
        return held

    def _numbers(self, number: int, what: str, dtype: type[np.generic]) -> np.ndarray:
        return np.frombuffer(read_bytes(self.folder / f"{number:06d}.{what}", READING, LARGEST), dtype)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for number in range(self.count):
            yield from self._lines(f"{number:06d}.jsonl.gz")

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        with gzip.open(self.folder / name, "rb") as lines:
            for line in lines:
                yield parse_json(line, str(self.folder / name), READING, finite=False, whole=False)


def _on_disk(path: Path, count: int) -> np.ndarray:
    """[count, H] uint32 in a file whose place is reserved: a mapped page that finds none on a full disk kills."""
    size = count * SIZE * 4
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except AttributeError:  # macOS has no such call
            file.truncate(size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise OSError(error.errno, error.strerror, str(path)) from error
            file.truncate(size)
    return np.memmap(path, np.uint32, "r+", shape=(count, SIZE))


class _Shards:
    """JSON lines in numbered gzip files, the same bytes for the same rows."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number, self._held = folder, 0, 0
        self._file: gzip.GzipFile | None = None
        self._below: BinaryIO | None = None

    def add(self, row: dict[str, Any]) -> None:
        if self._file is None:
            path = self._folder / f"{self._number:04d}.jsonl.gz"
            self._below = path.open("wb")
            self._file = gzip.GzipFile("", "wb", ZIPPED, self._below, mtime=0)
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        self._file.write(line)
        self._held += len(line)
        if self._held >= SHARD:
            self.close()

    def close(self) -> None:
        if self._file is not None and self._below is not None:
            self._file.close()
            self._below.close()  # a gzip file leaves open what it was given
        self._file, self._below, self._held = None, None, 0
        self._number += 1
