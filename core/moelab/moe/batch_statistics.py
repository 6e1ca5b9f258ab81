"""What routers and balance losses are told of a whole batch: loads and means over micro-batches and ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from moelab.moe.balance import NamedLoss
from moelab.moe.block import MoEBlock
from moelab.moe.contracts import BalanceContext
from moelab.moe.routing import LayerRecord


class BatchStatistics:
    """Sums over micro-batches, on the device; `add` each one's records, then `reduce` over ranks.

    `losses`: the balance losses that will ask, none of which saves counting for them; None: whoever asks.
    """

    def __init__(self, losses: Sequence[NamedLoss] | None = None) -> None:
        self.for_losses = losses is None or len(losses) > 0
        self.counting = [named for named in losses or () if hasattr(named.loss, "batch_count")]
        self.wanted: dict[int, Tensor] = {}  # layer -> [E'] int64
        self._balance: dict[int, Tensor] = {}  # layer -> [E'] int64, where balance losses count something else
        self._statistics: dict[int, Tensor] = {}  # layer -> [M], times tokens
        self._own: dict[str, dict[int, Tensor]] = {}  # loss -> layer -> [M] int64, `BalanceLoss.batch_count`
        self.tokens: Tensor | None = None  # scalar int64, not padding

    @torch.no_grad()
    def add(self, records: Sequence[LayerRecord]) -> None:
        """One micro-batch: the records of all MoE layers."""
        for index, record in enumerate(records):
            routing = record.routing
            mask = routing.token_mask
            if mask is not None:
                tokens = mask.sum()
            else:
                tokens = torch.full((), routing.num_tokens, dtype=torch.int64, device=record.counts.device)
            if index == 0:
                self.tokens = tokens if self.tokens is None else self.tokens + tokens
            _add(self.wanted, record.layer_id, record.wanted)
            if self.for_losses and routing.counted_top_k:
                _add(self._balance, record.layer_id, record.balance_counts)
            for named in self.counting:
                if named.layers is None or record.layer_id in named.layers:
                    _add(self._own.setdefault(named.name, {}), record.layer_id, named.batch_count(record))
            if routing.statistics is not None:
                _add(self._statistics, record.layer_id, routing.statistics.double() * tokens)

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Sum over ranks: `all_reduce` sums one tensor."""
        if self.tokens is None:
            return
        self.tokens = all_reduce(self.tokens)
        for sums in (self.wanted, self._balance, self._statistics, *self._own.values()):
            for layer_id in sorted(sums):
                sums[layer_id] = all_reduce(sums[layer_id])

    def context(self, named: NamedLoss | None = None) -> BalanceContext:
        """What the balance losses are told; with what `named` counts itself, if it does."""
        if not self.for_losses or not self.wanted:
            return BalanceContext(None, self.tokens)
        own = None if named is None else self._own.get(named.name)
        return BalanceContext(self.wanted | self._balance, self.tokens, self.wanted, own)

    def mean_statistics(self, layer_id: int) -> Tensor | None:
        """The mean of `Routing.statistics` over the batch's tokens, [M] fp32; None when the router gives none."""
        found = self._statistics.get(layer_id)
        if found is None or self.tokens is None:
            return None
        return (found / self.tokens.clamp_min(1)).float()

    def after_step(self, blocks: Iterable[MoEBlock], step: int = 0) -> None:
        """Hand every router that asks for it its counts and statistics; once, after optimizer step `step` (from 0)."""
        for block in blocks:
            after_step = getattr(block.router, "after_step", None)
            if after_step is None or block.layer_id not in self.wanted:
                continue
            call_after_step(after_step, self.wanted[block.layer_id], self.mean_statistics(block.layer_id), step)


def call_after_step(after_step: Callable[..., None], counts: Tensor, statistics: Tensor | None, step: int) -> None:
    """`Router.after_step` with what it takes: a router without statistics or schedule may take counts alone."""
    told = {"step": step} if "step" in inspect.signature(after_step).parameters else {}
    after_step(counts, *([] if statistics is None else [statistics]), **told)


def _add(sums: dict[int, Tensor], layer_id: int, value: Tensor) -> None:
    sums[layer_id] = sums[layer_id] + value if layer_id in sums else value.clone()
