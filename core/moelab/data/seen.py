"""Which text some weights have met: a record that travels with them, so that nobody scores what they were trained on.

`moelab_data.json` stands in every checkpoint and is carried by `moelab export` and `moelab upcycle`: 64-bit hashes
(`data.identity`) of the documents that this run and those before it (`train.init_from`) trained on and held out. Eight
bytes and one bit a document, in base64, nothing executable: 11 MB for a million documents.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moelab.data.corpus import Corpus, TokenStream
from moelab.data.identity import token_identities, token_kind
from moelab.data.tokenizer import Tokenizer
from moelab.errors import CheckpointError
from moelab.records import Record
from moelab.records import read_record as read_json_record
from moelab.safe_files import Reading

RECORD = "moelab_data.json"
FORMAT_VERSION = 1
LARGEST = 2 << 30  # bytes: of some 180 million documents
READING = Reading(CheckpointError, "take it from the checkpoint again, with a moelab as new as the one that wrote it")
BEGAN = "the weights it began with"  # for a run that goes on without its train.init_from
Hashes = Mapping[str, np.ndarray]  # {kind of identity: [n] uint64, rising, each once}


@dataclass(frozen=True)
class DataRecord:
    """What weights have met. `read` is the part of `training` of which a batch held at least one token."""

    training: Hashes = field(default_factory=dict)
    read: Hashes = field(default_factory=dict)
    held_out: Hashes = field(default_factory=dict)
    fingerprints: tuple[str, ...] = ()  # of the corpora, oldest first
    unknown: tuple[str, ...] = ()  # weights among their ancestors of which nothing is recorded

    def __or__(self, other: DataRecord) -> DataRecord:
        """What weights have met that come from both, or from one and then the other."""
        return DataRecord(
            _union(self.training, other.training),
            _union(self.read, other.read),
            _union(self.held_out, other.held_out),
            tuple(dict.fromkeys([*self.fingerprints, *other.fingerprints])),
            tuple(dict.fromkeys([*self.unknown, *other.unknown])),
        )

    def to_bytes(self) -> bytes:
        """The content of moelab_data.json."""
        content: dict[str, Any] = {"format_version": FORMAT_VERSION, "fingerprints": list(self.fingerprints)}
        content["unknown"] = list(self.unknown)
        for part in ("training", "held_out"):
            content[part] = {kind: _packed(hashes.astype("<u8")) for kind, hashes in getattr(self, part).items()}
        content["read"] = {
            kind: _packed(np.packbits(np.isin(hashes, self.read.get(kind, hashes[:0]))))
            for kind, hashes in self.training.items()
        }
        return json.dumps(content, indent=1).encode()


@dataclass(frozen=True)
class SeenText:
    """How much of a run's held-out text its starting weights have met. Counts of documents; exact where known."""

    source: str | None = None  # train.init_from
    scored: int = 0  # documents of which the evaluation reads a token
    scored_trained: int = 0  # of these, in the training text of the starting weights
    scored_read: int = 0  # and read by them, at least in part
    held_out: int = 0  # all held-out documents
    held_out_trained: int = 0
    unknown: tuple[str, ...] = ()  # ancestors without a record: more may have been seen

    def lines(self) -> list[str]:
        """What a reader must know before believing the held-out loss; none if nothing was met."""
        told = []
        if self.scored_trained:
            told.append(
                f"{self.scored_trained} of {self.scored} held-out documents that are scored "
                f"({self.held_out_trained} of all {self.held_out}) are training text of {self.source or BEGAN}, "
                f"which has read {self.scored_read} of them (in part at least): what was read has too low a loss. Keep "
                "data.split_seed and data.validation_fraction as they were there (another order is "
                "data.order_seed), or hold out other text"
            )
        if self.unknown:
            told.append(
                f"held-out text may have been seen: {', '.join(self.unknown)} keeps no record ({RECORD}) of what it "
                "was trained on"
            )
        return told


def record_of_run(corpus: Corpus, tokenizer: Tokenizer, documents_read: np.ndarray) -> DataRecord:
    """documents_read [n] bool, of the training stream's documents -> the record of one run alone."""
    kind = _kind(corpus, tokenizer)
    training = _identities(corpus.train, tokenizer)
    held_out = np.unique(_identities(corpus.validation, tokenizer))
    return DataRecord(
        {kind: np.unique(training)},
        {kind: np.unique(training[documents_read])},
        {kind: held_out},
        (corpus.fingerprint,),
    )


def seen_text(
    history: DataRecord, source: str | None, corpus: Corpus, tokenizer: Tokenizer, scored: np.ndarray
) -> SeenText:
    """scored [n] bool, of the held-out documents -> how many of them stand in `history`."""
    kind, mine = _kind(corpus, tokenizer), _identities(corpus.validation, tokenizer)
    none = mine[:0]
    trained, read = (np.isin(mine, part.get(kind, none)) for part in (history.training, history.read))
    others = [
        f"{source} (by '{other}', which can't be compared with '{kind}')" for other in history.training if other != kind
    ]
    return SeenText(
        source,
        int(scored.sum()),
        int((trained & scored).sum()),
        int((read & scored).sum()),
        len(mine),
        int(trained.sum()),
        (*history.unknown, *others),
    )


def read_record(folder: Path) -> DataRecord | None:
    """The record of a checkpoint folder; None if it has none. Raises CheckpointError for one that can't be read."""
    path = folder / RECORD
    if not path.is_file():
        return None
    content = read_json_record(path, READING, limit=LARGEST)
    content.integer("format_version", most=FORMAT_VERSION)
    training, held_out = (_hashes(content.record(part)) for part in ("training", "held_out"))
    bits = content.record("read")
    read = {kind: hashes[_bits(bits, kind, len(hashes))] for kind, hashes in training.items()}
    fingerprints, unknown = (tuple(content.listed(key, str)) for key in ("fingerprints", "unknown"))
    return DataRecord(training, read, held_out, fingerprints, unknown)


def carried_record(folders: Sequence[Path]) -> dict[str, bytes]:
    """{file name: content} of what a checkpoint made from these carries; none where none of them has a record."""
    if not any((folder / RECORD).is_file() for folder in folders):
        return {}
    return {RECORD: history_of(folders, [folder.name for folder in folders]).to_bytes()}


def history_of(folders: Iterable[Path], names: Iterable[str] | None = None) -> DataRecord:
    """The records of all these weights together; those without one are unknown, under `names` (the folders')."""
    folders = list(folders)
    found = DataRecord()
    for folder, name in zip(folders, names or [str(folder) for folder in folders], strict=True):
        record = read_record(folder)
        found |= DataRecord(unknown=(name,)) if record is None else record
    return found


def _kind(corpus: Corpus, tokenizer: Tokenizer) -> str:
    if corpus.train.identities is None:
        return token_kind(tokenizer.fingerprint, tokenizer.eos_token_id)
    return corpus.identity_kind


def _identities(stream: TokenStream, tokenizer: Tokenizer) -> np.ndarray:
    if stream.identities is not None:
        return stream.identities
    return token_identities(stream.tokens, stream.document_starts, tokenizer.eos_token_id)


def _union(first: Hashes, second: Hashes) -> dict[str, np.ndarray]:
    none = np.zeros(0, np.uint64)
    return {kind: np.union1d(first.get(kind, none), second.get(kind, none)) for kind in {**first, **second}}


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _unpacked(record: Record, kind: str, dtype: Any) -> np.ndarray:
    try:
        return np.frombuffer(base64.b64decode(record.text(kind, longest=LARGEST), validate=True), dtype)
    except ValueError:  # no base64, or no whole number of items
        return record.refuse(kind, f"base64 of {np.dtype(dtype).itemsize} bytes a document")


def _bits(record: Record, kind: str, count: int) -> np.ndarray:
    packed = _unpacked(record, kind, np.uint8)
    if len(packed) != -(-count // 8):
        record.refuse(kind, f"a bit for each of {count} documents")
    return np.unpackbits(packed, count=count).astype(bool)


def _hashes(record: Record) -> dict[str, np.ndarray]:
    return {kind: np.unique(_unpacked(record, kind, "<u8").astype(np.uint64)) for kind in record.values}
