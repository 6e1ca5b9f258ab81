"""Batches of a mixture: each window is of one domain, and each domain is read in an order and in epochs of its own.

S tokens a window, B a batch, D domains. A domain's documents, wherever they lie in the stream, are one text end to end,
cut into windows as `batches` cuts the whole stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moelab.data.batches import IGNORED, Batch
from moelab.data.corpus import TokenStream
from moelab.data.mixing import Deal, Mixer, shares
from moelab.data.permutation import Permutation
from moelab.errors import DataError
from moelab.seeds import derive_seed

_TOGETHER = 1 << 20  # windows whose places are computed at once
_STEPS = 64  # whose windows are computed at once


class DomainText:
    """The documents of one domain as one text. Positions in it are virtual."""

    def __init__(self, stream: TokenStream, domain: int) -> None:
        self.documents = np.flatnonzero(stream.document_domain == domain)
        self.begins = np.asarray(stream.document_starts)[self.documents]
        lengths = np.asarray(stream.document_starts)[self.documents + 1] - self.begins
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def document_at(self, virtual: np.ndarray) -> np.ndarray:
        """virtual [...] int64 -> index into `documents` [...]."""
        return np.searchsorted(self.starts, virtual, side="right") - 1


class MixedBatches:
    """`batch(step)` for any step >= 0, as `TrainBatches`, but with the shares of a mixer."""

    def __init__(
        self, stream: TokenStream, domains: Sequence[str], mixer: Mixer, batch_size: int, sequence_length: int,
        seed: int, *, apart: bool = False,
    ) -> None:  # fmt: skip
        """`apart`: as of `TrainBatches`.

        Raises ConfigError for a domain that is not there, DataError for one too short for a single window."""
        self.stream, self.domains, self.batch_size, self.seed = stream, list(domains), batch_size, seed
        self.sequence_length, self.apart = sequence_length, apart
        self.wanted = [shares(phase.weights, self.domains) for phase in mixer.phases]
        self.deals = [Deal(wanted, self.domains, seed, number) for number, wanted in enumerate(self.wanted)]
        self.ends = [phase.until for phase in mixer.phases]
        self.texts = [DomainText(stream, domain) for domain in range(len(self.domains))]
        self._first = np.concatenate([[0], np.cumsum([len(text) for text in self.texts])]).astype(np.int64)  # [D + 1]
        self._starts = np.concatenate(
            [text.starts[:-1] + first for text, first in zip(self.texts, self._first, strict=False)]
        )
        self._shift = np.concatenate([text.begins for text in self.texts]) - self._starts  # [n] to places in the stream
        self._documents = np.concatenate([text.documents for text in self.texts])  # [n]
        self.windows = [max(0, len(text) - 1) // sequence_length for text in self.texts]
        for domain, name in enumerate(self.domains):
            if self.windows[domain] == 0 and any(wanted[domain] > 0 for wanted in self.wanted):
                raise DataError(
                    f"data.mixer: domain '{name}' is asked for and has {len(self.texts[domain])} training tokens, too "
                    f"few for one sequence of {sequence_length} and its last target; give it no weight, or more text"
                )

    def batch(self, step: int) -> Batch:
        """The batch of `step`, counted from 0."""
        domain, window = self.windows_of(step)
        virtual = window[:, None] * self.sequence_length + np.arange(self.sequence_length + 1)  # [B, S + 1]
        virtual += self._first[domain][:, None]  # of all domains' texts end to end
        at = np.searchsorted(self._starts, virtual, side="right") - 1
        position, document = virtual + self._shift[at], self._documents[at]
        tokens = np.asarray(self.stream.tokens[position.reshape(-1)]).reshape(position.shape).astype(np.int64)
        targets = tokens[:, 1:].copy()
        if self.apart:
            targets[document[:, 1:] != document[:, :-1]] = IGNORED
        return Batch(
            input_ids=torch.from_numpy(tokens[:, :-1].copy()),
            targets=torch.from_numpy(targets),
            document_id=torch.from_numpy(document[:, :-1].copy()),
            domain_id=torch.from_numpy(np.repeat(domain[:, None], self.sequence_length, 1)),
            attention_id=torch.from_numpy(document[:, :-1].copy()) if self.apart else None,
        )

    def windows_of(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """-> (domain [B] int64, window of that domain's text [B] int64)."""
        first = step - step % _STEPS
        if self._kept is None or self._kept[0] != first:  # numpy takes as long for one step as for many
            pieces, begin = [], first
            while begin < first + _STEPS:
                phase, phase_first = self._phase_of(begin)
                end = min(first + _STEPS, self.ends[phase] or first + _STEPS)
                pieces.append(self._windows(phase, phase_first, begin, end))
                begin = end
            domains, windows = zip(*pieces, strict=True)
            self._kept = (first, np.concatenate(domains), np.concatenate(windows))
        _, domain, window = self._kept
        mine = slice((step - first) * self.batch_size, (step - first + 1) * self.batch_size)
        return domain[mine], window[mine]

    _kept: tuple[int, np.ndarray, np.ndarray] | None = None  # (first step, domain, window of each), last asked for

    def _windows(self, phase: int, first: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the steps `begin` .. `end` of a phase that began at `first`: [(end - begin) * B] int64 each."""
        sample = np.arange((begin - first) * self.batch_size, (end - first) * self.batch_size, dtype=np.int64)
        domain = self.deals[phase].domain_of(sample)
        place = self.dealt(first)[domain] + self.deals[phase].within(sample)
        window = np.empty_like(place)
        for number in np.unique(domain):
            mine = domain == number
            window[mine] = self._ordered(int(number), place[mine])
        return domain, window

    def dealt(self, steps: int) -> np.ndarray:
        """How many windows of each domain the batches before `steps` hold: [D] int64."""
        total, first = np.zeros(len(self.domains), np.int64), 0
        for deal, end in zip(self.deals, self.ends, strict=True):
            last = steps if end is None else min(steps, end)
            total += deal.dealt(max(0, last - first) * self.batch_size)
            first = last
        return total

    def asked(self, steps: int, first: int = 0) -> np.ndarray:
        """The share of the tokens of the steps from `first` to `steps` that each domain should have had: [D].

        Where there are none, those of the first of them."""
        total, begin, steps = np.zeros(len(self.domains)), 0, max(steps, first + 1)
        for wanted, end in zip(self.wanted, self.ends, strict=True):
            last = steps if end is None else min(steps, end)
            total += wanted * max(0, last - max(begin, first))
            begin = last
        return np.asarray(total / total.sum())

    def epochs(self, steps: int) -> np.ndarray:
        """How often each domain's text was read before `steps`: [D]; 0 where there is no text."""
        return np.asarray(self.dealt(steps) / np.maximum(self.windows, 1))

    def account(self, steps: int, first: int = 0) -> dict[str, Any]:
        """{domain: asked share, read share, epochs} of the batches from `first` to before `steps`."""
        dealt, asked = self.dealt(steps) - self.dealt(first), self.asked(steps, first)
        epochs = self.epochs(steps) - self.epochs(first)
        total = max(1, int(dealt.sum()))
        return {
            name: {"asked": float(asked[d]), "read": int(dealt[d]) / total, "epochs": float(epochs[d])}
            for d, name in enumerate(self.domains)
        }

    def documents_read(self, steps: int) -> np.ndarray:
        """[n] bool: the documents of which the batches before `steps` held a token."""
        read = np.zeros(len(self.stream.document_names), bool)
        for domain, count in enumerate(self.dealt(steps)):
            text, windows = self.texts[domain], self.windows[domain]
            change = np.zeros(len(text.documents) + 1, np.int64)
            for begin in range(0, min(int(count), windows), _TOGETHER):
                places = np.arange(begin, min(begin + _TOGETHER, int(count), windows))
                virtual = self._ordered(domain, places) * self.sequence_length
                np.add.at(change, text.document_at(virtual), 1)
                np.add.at(change, text.document_at(virtual + self.sequence_length) + 1, -1)
            read[text.documents[np.cumsum(change)[:-1] > 0]] = True
        return read

    def _phase_of(self, step: int) -> tuple[int, int]:
        """-> (phase, its first step)."""
        first = 0
        for number, end in enumerate(self.ends):
            if end is None or step < end:
                return number, first
            first = end
        raise AssertionError("the last phase has no end")

    def _ordered(self, domain: int, place: np.ndarray) -> np.ndarray:
        """The n-th windows that are read of a domain: place [n] int64 -> window [n] int64."""
        windows = self.windows[domain]
        epoch, within = np.divmod(place, windows)
        chosen = np.empty_like(within)
        for number in np.unique(epoch):
            order = Permutation(windows, derive_seed(self.seed, "epoch", self.domains[domain], int(number)))
            chosen[epoch == number] = order(within[epoch == number])
        return chosen
