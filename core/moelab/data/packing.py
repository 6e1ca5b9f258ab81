"""Whole documents laid into sequences: `concat` end to end in a new order each epoch, `best_fit` where they fit.

As `batches.TrainBatches` a pure function of (seed, step). B sequences, S positions each, n documents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from moelab.data.batches import IGNORED, Batch, TrainBatches, count_windows
from moelab.data.corpus import TokenStream
from moelab.data.permutation import Permutation
from moelab.errors import DataError
from moelab.seeds import derive_seed

Piece = tuple[int, int, int]  # document, its first token, the token behind its last: places in the stream


@dataclass(frozen=True)
class Fill:
    """How well documents fill the sequences of an epoch."""

    documents: int
    sequences: int
    fill_rate: float  # share of positions that hold a token
    documents_cut: int  # those of which a sequence holds a part alone
    tokens_cut_off: float  # share of all tokens that do not stand in the sequence where their document begins
    tokens_left_out: float  # share that no sequence of an epoch holds

    def line(self) -> str:
        """In words."""
        return (
            f"{self.documents:,} documents in {self.sequences:,} sequences, {self.fill_rate:.1%} of positions filled; "
            f"{self.documents_cut:,} documents are cut, {self.tokens_cut_off:.1%} of tokens stand apart from their "
            f"beginning, {self.tokens_left_out:.1%} are left out of an epoch"
        )


class PackedBatches(TrainBatches, ABC):
    """`batch(step)` of sequences that `pieces_of` fills; targets end with the sequence, or with `apart` the document.

    Padding stands at the end of a sequence, has no target and is masked.
    """

    def __init__(
        self, stream: TokenStream, batch_size: int, sequence_length: int, seed: int, *, apart: bool = False
    ) -> None:
        count_windows(stream, sequence_length, "training")  # raises for too short a text
        if len(stream.document_names) < 2:
            raise DataError(
                "data.packing: the training text is one document, so there is nothing to pack; write "
                "data.packing=stream, or take a source that tells documents apart (eos_token_id of tokens, separator "
                "of text)"
            )
        self.stream, self.batch_size, self.sequence_length = stream, batch_size, sequence_length
        self.seed, self.apart = seed, apart
        self.windows = self.count()

    @abstractmethod
    def count(self) -> int:
        """Sequences of an epoch."""

    @abstractmethod
    def pieces_of(self, epoch: int, place: int) -> list[Piece]:
        """What the sequence at a place 0 .. windows - 1 of an epoch holds."""

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64: tokens of each document, its end included."""
        return np.diff(self.stream.document_starts)

    def rows(self, step: int) -> list[list[Piece]]:
        """The pieces of each sequence of a batch."""
        samples = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self.pieces_of(*divmod(sample, self.windows)) for sample in samples]

    def batch(self, step: int) -> Batch:
        """The batch of `step`, counted from 0."""
        return packed_batch(self.stream, self.rows(step), self.sequence_length, apart=self.apart)

    def documents_read(self, steps: int) -> np.ndarray:
        """[n] bool: the documents of which the batches before `steps` held a token."""
        read = np.zeros(len(self.stream.document_names), bool)
        for place in range(min(steps * self.batch_size, self.windows)):  # the first epoch reads all that later ones do
            read[[document for document, _, _ in self.pieces_of(0, place)]] = True
        return read

    @cached_property
    def fill(self) -> Fill:
        """Of the first epoch."""
        held = np.zeros(len(self.stream.document_names), np.int64)
        first = np.zeros_like(held)
        for place in range(self.windows):
            for document, begin, end in self.pieces_of(0, place):
                held[document] += end - begin
                if begin == self.stream.document_starts[document]:
                    first[document] = end - begin
        total, positions = len(self.stream), self.windows * self.sequence_length
        return Fill(
            len(held),
            self.windows,
            float(held.sum()) / positions,
            int((first < self.lengths).sum()),
            float((held - first).sum()) / total,
            1 - float(held.sum()) / total,
        )


class ConcatBatches(PackedBatches):
    """Documents end to end, in an order of its own each epoch, cut where a sequence is full; nothing is padded.

    Krell et al. (2107.02027) call it concatenation; GPT-3's and Llama's way.
    """

    def count(self) -> int:
        """All full sequences: what is left of an epoch's last is not read."""
        return len(self.stream) // self.sequence_length

    def pieces_of(self, epoch: int, place: int) -> list[Piece]:
        order, ends = self._laid(epoch)
        begin, pieces = place * self.sequence_length, []
        stop = begin + self.sequence_length
        index = int(np.searchsorted(ends, begin, side="right"))
        while begin < stop:
            document, end = int(order[index]), min(int(ends[index]), stop)
            offset = int(self.stream.document_starts[document + 1]) - int(ends[index])
            pieces.append((document, begin + offset, end + offset))
            begin, index = end, index + 1
        return pieces

    def documents_read(self, steps: int) -> np.ndarray:
        read = np.zeros(len(self.stream.document_names), bool)
        epochs, rest = divmod(steps * self.batch_size, self.windows)
        for epoch in range(epochs + 1):  # each leaves out another end
            order, ends = self._laid(epoch)
            tokens = self.sequence_length * (self.windows if epoch < epochs else rest)
            read[order[: np.searchsorted(ends, tokens, side="left") + 1] if tokens else []] = True
        return read

    def _laid(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents in their order, where each ends), both [n]; of the last epoch that was asked for."""
        if self._kept is None or self._kept[0] != epoch:
            count = len(self.stream.document_names)
            order = Permutation(count, derive_seed(self.seed, "documents", epoch))(np.arange(count))
            self._kept = (epoch, order, np.cumsum(self.lengths[order]))
        return self._kept[1], self._kept[2]

    _kept: tuple[int, np.ndarray, np.ndarray] | None = None


class BestFitBatches(PackedBatches):
    """Each document whole in one sequence, if it is no longer; the fullest sequence that has room for it takes it.

    Best-fit decreasing, Ding et al. (2404.10830) 3.1: longer documents are cut into sequences of their own, and what is
    left of them is packed as a document. The order of sequences is the seed's, what lies in one is the text's.
    """

    def count(self) -> int:
        return len(self.sequences)

    def pieces_of(self, epoch: int, place: int) -> list[Piece]:
        if self._kept is None or self._kept[0] != epoch:
            order = Permutation(self.windows, derive_seed(self.seed, "epoch", epoch))
            self._kept = (epoch, order(np.arange(self.windows)))
        return self.sequences[int(self._kept[1][place])]

    _kept: tuple[int, np.ndarray] | None = None

    @cached_property
    def sequences(self) -> list[list[Piece]]:
        """The pieces of each sequence."""
        size, starts = self.sequence_length, self.stream.document_starts
        whole: list[list[Piece]] = []
        short: list[Piece] = []
        for document in range(len(self.stream.document_names)):
            begin, end = int(starts[document]), int(starts[document + 1])
            while end - begin >= size:
                whole.append([(document, begin, begin + size)])
                begin += size
            short += [(document, begin, end)] if begin < end else []
        short.sort(key=lambda piece: piece[1] - piece[2])  # stable: the longest first, else as they stand
        open_rows: dict[int, list[int]] = {}  # room -> sequences with just that
        rooms: list[int] = []  # its keys, rising
        packed: list[list[Piece]] = []
        for piece in short:
            need = piece[2] - piece[1]
            at = bisect_left(rooms, need)
            if at < len(rooms):
                room = rooms[at]
                row = open_rows[room].pop()
                if not open_rows[room]:
                    del open_rows[room], rooms[at]
            else:
                room, row = size, len(packed)
                packed.append([])
            packed[row].append(piece)
            left = room - need
            if left and left not in open_rows:
                open_rows[left] = []
                insort(rooms, left)
            if left:
                open_rows[left].append(row)
        return whole + packed


def packed_batch(stream: TokenStream, rows: list[list[Piece]], size: int, *, apart: bool) -> Batch:
    """rows: the pieces of each sequence -> Batch [B, size], padded at the end. `apart`: attention and targets too."""
    shape = (len(rows), size)
    tokens, document = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    targets, piece_id = np.full(shape, IGNORED, np.int64), np.full(shape, -1, np.int64)
    for row, pieces in enumerate(rows):
        at = 0
        for number, (which, begin, end) in enumerate(pieces):
            stop = at + end - begin
            tokens[row, at:stop] = stream.tokens[begin:end]
            document[row, at:], piece_id[row, at:stop] = which, number  # padding counts as the last document's
            last = min(end + 1, int(stream.document_starts[which + 1]))
            targets[row, at : at + last - begin - 1] = stream.tokens[begin + 1 : last]
            if not apart and number:
                targets[row, at - 1] = tokens[row, at]
            at = stop
    real = torch.from_numpy(piece_id >= 0)
    return Batch(
        input_ids=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        document_id=torch.from_numpy(document),
        domain_id=torch.from_numpy(stream.document_domain[document].astype(np.int64)),
        attention_mask=None if bool(real.all()) else real,
        attention_id=torch.from_numpy(piece_id) if apart else None,
    )


PACKINGS: Mapping[str, type[TrainBatches]] = {
    "stream": TrainBatches, "concat": ConcatBatches, "best_fit": BestFitBatches,
}  # fmt: skip
