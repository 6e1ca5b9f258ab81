"""All pieces together: which documents are copies of one before them, and the text that is left."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moelab.data.minhash import SIZE, near_copies
from moelab.safe_files import parse_json, read_bytes, read_object
from moelab_tools.curate.account import EXACT, NEAR, SAME_SHINGLES, SAME_TEXT, Account
from moelab_tools.curate.declaration import DeduplicateConfig
from moelab_tools.curate.filtering import READING, ZIPPED

LARGEST = 1 << 30  # bytes of numbers of one piece
SHARD = 256_000_000  # bytes of text in a file of the output
KEPT, EXACT_COPY, NEAR_COPY = 0, 1, 2


@dataclass(frozen=True)
class Pieces:
    """The folder of the finished pieces."""

    folder: Path
    count: int

    def account(self) -> Account:
        """Of all pieces, in their order."""
        total = Account()
        for number in range(self.count):
            total.add(Account.from_json(read_object(self.folder / f"{number:06d}.json", READING)["account"]))
        return total

    def copies(self, config: DeduplicateConfig, account: Account) -> np.ndarray:
        """[n] int8 over all kept documents: KEPT, EXACT_COPY or NEAR_COPY; the account says so too."""
        identities = np.concatenate([self._numbers(number, "identities", np.uint64) for number in range(self.count)])
        what = np.full(len(identities), KEPT, np.int8)
        if config.exact and len(identities):
            _, first = np.unique(identities, return_index=True)
            again = np.ones(len(identities), bool)
            again[first] = False
            what[again] = EXACT_COPY
        if config.near is not None and len(identities):
            signatures = self._signatures(len(identities))
            what[near_copies(signatures, config.near, what == KEPT)] = NEAR_COPY
        for one, row in zip(what, self._rows(), strict=True):
            if one != KEPT:
                stage, reason = (EXACT, SAME_TEXT) if one == EXACT_COPY else (NEAR, SAME_SHINGLES)
                account.take_back(stage, reason, row["domain"], row["name"], "", row["text"])
        return what

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
                stage, reason = (EXACT, SAME_TEXT) if one == EXACT_COPY else (NEAR, SAME_SHINGLES)
                writer.add({**row, "stage": stage, "reason": reason, "measured": ""})
        writer.close()

    def _signatures(self, count: int) -> np.ndarray:
        """[n, H] uint32 in one file, so that they need not be in memory."""
        path = self.folder / "signatures.u32"
        held = np.memmap(path, np.uint32, "w+", shape=(count, SIZE))
        begin = 0
        for number in range(self.count):
            found = self._numbers(number, "signatures", np.uint32).reshape(-1, SIZE)
            held[begin : begin + len(found)] = found
            begin += len(found)
        return held

    def _numbers(self, number: int, what: str, dtype: type[np.generic]) -> np.ndarray:
        return np.frombuffer(read_bytes(self.folder / f"{number:06d}.{what}", READING, LARGEST), dtype)

    def _rows(self) -> Iterator[dict[str, str]]:
        for number in range(self.count):
            yield from self._lines(f"{number:06d}.jsonl.gz")

    def _lines(self, name: str) -> Iterator[dict[str, str]]:
        with gzip.open(self.folder / name, "rb") as lines:
            for line in lines:
                yield parse_json(line, str(self.folder / name), READING, finite=False, whole=False)


class _Shards:
    """JSON lines in numbered gzip files, the same bytes for the same rows."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number, self._held = folder, 0, 0
        self._file: gzip.GzipFile | None = None
        self._below: BinaryIO | None = None

    def add(self, row: dict[str, str]) -> None:
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
