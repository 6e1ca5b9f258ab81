"""The order in which a stream is read: a pure function of (seed, step), so resuming needs no state.

B sequences, S tokens each. The stream is cut into windows of S targets; window w reads tokens
[w S, w S + S] and its targets stand one to the right, so that every token but the first is a target once an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import ceil

import numpy as np
import torch
from torch import Tensor

from moelab.data.corpus import TokenStream
from moelab.data.permutation import Permutation
from moelab.errors import DataError
from moelab.seeds import derive_seed

IGNORED = -100  # as a target
_TOGETHER = 1 << 20  # windows whose places in the order are computed at once


@dataclass(frozen=True)
class Batch:
    """What a forward pass reads. Ids of documents index the stream's `document_names`, of domains the corpus's."""

    input_ids: Tensor  # [B, S] int64
    targets: Tensor  # [B, S] int64, -100 where there is nothing to predict
    document_id: Tensor  # [B, S] int64, of the input tokens
    domain_id: Tensor  # [B, S] int64, of the input tokens
    attention_mask: Tensor | None = None  # [B, S] bool, False for padding; None: no padding
    target_document_id: Tensor | None = None  # [B, S] int64, of the targets; held-out batches only
    target_bytes: Tensor | None = None  # [B, S] float64, text bytes of the targets; held-out batches, where known
    attention_id: Tensor | None = None  # [B, S] int64: attention and positions stay among equal ones; None: one text

    @property
    def token_count(self) -> int:
        """Tokens that are not padding. Ask on the host: on a device it waits."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in self._tensors()})

    def split(self, micro_batch_size: int) -> list[Batch]:
        """Batches of at most that many sequences, in order."""
        pieces = {name: value.split(micro_batch_size) for name, value in self._tensors()}
        return [Batch(**{name: piece[i] for name, piece in pieces.items()}) for i in range(len(pieces["input_ids"]))]

    def narrow(self, tokens: int) -> Batch:
        """The first `tokens` positions of every sequence."""
        return Batch(**{name: value[:, :tokens] for name, value in self._tensors()})

    def _tensors(self) -> list[tuple[str, Tensor]]:
        pairs = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in pairs if value is not None]


class TrainBatches:
    """`batch(step)` for any step >= 0: the same seed gives the same batches whatever model reads them.

    Each epoch reads every window once, in an order of its own. The order is computed, not stored, and the
    stream is only sliced, so it may be a memmap of any size.
    """

    def __init__(
        self, stream: TokenStream, batch_size: int, sequence_length: int, seed: int, *, apart: bool = False
    ) -> None:
        """`apart`: attention, positions and targets stay within a document."""
        self.stream = stream
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.seed = seed
        self.apart = apart
        self.windows = count_windows(stream, sequence_length, "training")

    @property
    def tokens_per_epoch(self) -> int:
        return self.windows * self.sequence_length

    def window_ids(self, step: int) -> np.ndarray:
        """[B] int64: which windows the batch of this step holds."""
        sample = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        epoch, place = np.divmod(sample, self.windows)
        chosen = np.empty_like(place)
        for number in np.unique(epoch):
            order = Permutation(self.windows, derive_seed(self.seed, "epoch", int(number)))
            chosen[epoch == number] = order(place[epoch == number])
        return chosen

    def documents_read(self, steps: int) -> np.ndarray:
        """[n] bool: the documents of which the batches before `steps` held a token."""
        samples = min(steps * self.batch_size, self.windows)  # the first epoch reads all that later ones do
        read = np.zeros(self.windows, bool)
        order = Permutation(self.windows, derive_seed(self.seed, "epoch", 0))
        for begin in range(0, samples, _TOGETHER):
            read[order(np.arange(begin, min(begin + _TOGETHER, samples)))] = True
        return _documents_in(self.stream, np.flatnonzero(read), self.sequence_length, first=0)

    def batch(self, step: int) -> Batch:
        """The batch of `step`, counted from 0."""
        return read_windows(self.stream, self.window_ids(step), self.sequence_length, apart=self.apart)


class ValidationBatches:
    """A fixed choice of non-overlapping windows, as many from each domain as there are, in turn.

    A window belongs to the domain of its middle token. `sequences` of them are read, or all if there are
    fewer (`len(windows)` tells); iterating yields Batches with `target_document_id` and, where known,
    `target_bytes`, so that nats, tokens and bytes can be summed per document.
    """

    def __init__(
        self, stream: TokenStream, sequences: int, sequence_length: int, batch_size: int, *, apart: bool = False,
        among: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """`apart`: attention, positions and targets stay within a document. `among` [n] bool: of which domains windows
        are chosen, None: of all."""
        self.stream = stream
        self.apart = apart
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        available = count_windows(stream, sequence_length, "held-out")
        middles = np.arange(available, dtype=np.int64) * sequence_length + sequence_length // 2
        domain = stream.document_domain[stream.document_of(middles)]
        ours = np.arange(available) if among is None else np.flatnonzero(among[domain])
        if not len(ours):
            raise DataError(
                "evaluation.domains: none of the held-out windows is of these domains; name others, or raise "
                "data.validation_fraction"
            )
        self.windows = ours[_fair_choice(domain[ours], min(sequences, len(ours)))]  # [windows] int64, in reading order

    def documents_scored(self) -> np.ndarray:
        """[n] bool: the documents of which a target lies in a chosen window."""
        return _documents_in(self.stream, self.windows, self.sequence_length, first=1)

    def __len__(self) -> int:
        return ceil(len(self.windows) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for begin in range(0, len(self.windows), self.batch_size):
            chosen = self.windows[begin : begin + self.batch_size]
            yield read_windows(self.stream, chosen, self.sequence_length, measure=True, apart=self.apart)


def count_windows(stream: TokenStream, sequence_length: int, what: str) -> int:
    """How many windows a stream holds. Raises DataError if not even one."""
    windows = (len(stream) - 1) // sequence_length
    if windows < 1:
        raise DataError(
            f"train.sequence_length: the {what} text has {len(stream)} tokens, too few for one sequence of "
            f"{sequence_length} and its last target; give more text, or lower it to at most {max(0, len(stream) - 1)}"
            + (", or raise data.validation_fraction" if what == "held-out" else "")
        )
    return windows


def read_windows(
    stream: TokenStream, windows: np.ndarray, sequence_length: int, *, measure: bool = False, apart: bool = False
) -> Batch:
    """windows [B] int64 -> Batch [B, S]; `measure` adds the documents and bytes of the targets.

    `apart`: attention stays within a document, and its first token, which nothing in it foretells, is no target.
    """
    begins = windows * sequence_length
    spans = [(int(begin), int(begin) + sequence_length + 1) for begin in begins]
    tokens = np.stack([np.asarray(stream.tokens[begin:end]) for begin, end in spans]).astype(np.int64)  # [B, S + 1]
    document = stream.document_of(begins[:, None] + np.arange(sequence_length + 1))  # [B, S + 1]
    targets = tokens[:, 1:].copy()
    target_bytes = None
    if measure:
        counts = [stream.bytes_of(begin + 1, end) for begin, end in spans]
        known = [count for count in counts if count is not None]
        target_bytes = torch.from_numpy(np.stack(known).astype(np.float64)) if known else None
    if apart:
        border = document[:, 1:] != document[:, :-1]
        targets[border] = IGNORED
        if target_bytes is not None:
            target_bytes[torch.from_numpy(border)] = 0.0
    return Batch(
        input_ids=torch.from_numpy(tokens[:, :-1].copy()),
        targets=torch.from_numpy(targets),
        document_id=torch.from_numpy(document[:, :-1].copy()),
        domain_id=torch.from_numpy(stream.document_domain[document[:, :-1]].astype(np.int64)),
        target_document_id=torch.from_numpy(document[:, 1:].copy()) if measure else None,
        target_bytes=target_bytes,
        attention_id=torch.from_numpy(document[:, :-1].copy()) if apart else None,
    )


def _documents_in(stream: TokenStream, windows: np.ndarray, sequence_length: int, first: int) -> np.ndarray:
    """[n] bool: the documents of the windows' tokens from the `first` to the last target, which stands behind them."""
    begins = stream.document_of(windows * sequence_length + first)
    ends = stream.document_of((windows + 1) * sequence_length)
    change = np.zeros(len(stream.document_names) + 1, np.int64)  # how many windows begin less how many have ended
    np.add.at(change, begins, 1)
    np.add.at(change, ends + 1, -1)
    return np.cumsum(change)[:-1] > 0


def _fair_choice(domain: np.ndarray, wanted: int) -> np.ndarray:
    """domain [windows] -> window ids [wanted]: shares as equal as the domains allow, evenly spaced, taken in turn."""
    members = [np.flatnonzero(domain == number) for number in np.unique(domain)]
    shares = [0] * len(members)
    while sum(shares) < wanted:  # every pass fills one domain or finishes
        open_ = [i for i, member in enumerate(members) if shares[i] < len(member)]
        step = max(1, (wanted - sum(shares)) // len(open_))
        for i in open_:
            shares[i] += min(step, len(members[i]) - shares[i], wanted - sum(shares))
    spaced = [
        member[np.arange(share) * len(member) // max(1, share)] for member, share in zip(members, shares, strict=True)
    ]
    turns = [(turn, i) for i, share in enumerate(shares) for turn in range(share)]
    return np.array([spaced[i][turn] for turn, i in sorted(turns)], np.int64)
