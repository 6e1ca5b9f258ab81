"""Examples in batches: a pure function of (seed, step), so that resuming needs no state.

R rows of S tokens, padded at their end; of pairs, the chosen rows before the rejected ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from moelab.alignment.examples import Answer, Example
from moelab.data.batches import IGNORED
from moelab.data.permutation import Permutation
from moelab.seeds import derive_seed


@dataclass(frozen=True)
class AnswerBatch:
    """What a step of post-training reads; a micro-batch takes whole examples."""

    input_ids: Tensor  # [R, S] int64
    attention_mask: Tensor  # [R, S] bool, False for padding
    learned: Tensor  # [R, S] bool: tokens whose log-probability counts
    answers: int  # rows of an example: 1, or 2 for chosen and rejected
    routes: dict[int, Tensor] = field(default_factory=dict)  # layer -> [R, S, K] int64, where routes were recorded ...
    routed: Tensor | None = None  # [R, S] bool: ... and of which tokens

    @property
    def token_count(self) -> int:
        """Tokens that are not padding. Ask on the host: on a device it waits."""
        return int(self.attention_mask.sum())

    @property
    def examples(self) -> int:
        return len(self.input_ids) // self.answers

    @property
    def targets(self) -> int:
        """Tokens that are learned; the first of a row is foretold by nothing."""
        return int(self.learned[:, 1:].sum())

    @property
    def labels(self) -> Tensor:
        """[R, S] int64, as transformers wants them: not shifted, -100 where nothing is learned."""
        return self.input_ids.masked_fill(~self.learned, IGNORED)

    @property
    def document_id(self) -> Tensor:
        """[R, S] int64: each row is one."""
        return torch.arange(len(self.input_ids), device=self.input_ids.device)[:, None].expand_as(self.input_ids)

    @property
    def domain_id(self) -> Tensor:
        """[R, S] int64: there is one."""
        return torch.zeros_like(self.input_ids)

    @property
    def attention_id(self) -> None:
        """Nothing is packed."""
        return None

    def to(self, device: torch.device | str) -> AnswerBatch:
        ids, mask, learned = (t.to(device, non_blocking=True) for t in self._tensors())
        routes = {layer: expert.to(device, non_blocking=True) for layer, expert in self.routes.items()}
        routed = None if self.routed is None else self.routed.to(device, non_blocking=True)
        return AnswerBatch(ids, mask, learned, self.answers, routes, routed)

    def split(self, micro_batch_size: int) -> list[AnswerBatch]:
        """Batches of at most that many examples, in order, each as wide as its longest row."""
        found = []
        for begin in range(0, self.examples, micro_batch_size):
            end = min(begin + micro_batch_size, self.examples)
            rows = torch.cat([torch.arange(begin, end) + side * self.examples for side in range(self.answers)])
            width = int(self.attention_mask[rows].sum(1).max())
            ids, mask, learned = (t[rows, :width] for t in self._tensors())
            routes = {layer: expert[rows, :width] for layer, expert in self.routes.items()}
            routed = None if self.routed is None else self.routed[rows, :width]
            found.append(AnswerBatch(ids, mask, learned, self.answers, routes, routed))
        return found

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.input_ids, self.attention_mask, self.learned


def padded(rows: Sequence[Answer], answers: int, pad_id: int) -> AnswerBatch:
    """Rows of any lengths as one batch; padding is `pad_id`, which no mask shows."""
    width = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), width), pad_id, np.int64)
    mask, learned = np.zeros((len(rows), width), bool), np.zeros((len(rows), width), bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
        mask[index, : len(row.ids)] = True
        learned[index, : len(row.ids)] = row.learned
    routes: dict[int, Tensor] = {}
    routed = None if rows[0].routes is None else np.zeros((len(rows), width), bool)
    for index, row in enumerate(rows):
        for layer, expert in (row.routes or {}).items():
            known = min(len(expert), len(row.ids))
            into = routes.setdefault(layer, torch.zeros(len(rows), width, expert.shape[1], dtype=torch.int64))
            into[index, :known] = torch.from_numpy(expert[:known])
            if routed is not None:
                routed[index, :known] = True
    tensors = (torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(learned))
    return AnswerBatch(*tensors, answers, routes, None if routed is None else torch.from_numpy(routed))


@dataclass(frozen=True)
class ExampleBatches:
    """`batch(step)` for any step >= 0. Each epoch reads every example once, in an order of its own."""

    rows: Sequence[Example]
    batch_size: int
    seed: int
    pad_id: int
    documents: int = 0  # of the training text, none of which is read

    def chosen(self, step: int) -> list[Example]:
        """The examples of this step."""
        found = []
        for sample in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(sample, len(self.rows))
            order = Permutation(len(self.rows), derive_seed(self.seed, "alignment epoch", epoch))
            found.append(self.rows[int(order(np.array([place]))[0])])
        return found

    def batch(self, step: int) -> AnswerBatch:
        """The batch of `step`, counted from 0."""
        examples = self.chosen(step)
        sides = range(len(examples[0].answers))
        rows = [example.answers[side] for side in sides for example in examples]
        return padded(rows, len(sides), self.pad_id)

    def documents_read(self, steps: int) -> np.ndarray:
        """[n] bool: none of the training text."""
        return np.zeros(self.documents, bool)

    def with_rows(self, rows: Sequence[Example]) -> ExampleBatches:
        """The same order of others."""
        return replace(self, rows=rows)
