"""What other routes would have cost: the loss of every held-out token, with the model frozen and its routes changed.

B windows of S tokens in a batch. What lies below the lowest changed layer is computed once for all of them: with every
expert of L layers removed in turn, half of the work. One that touches no token of a batch is not computed at all: its
losses are those of the untouched model to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from moelab.data.batches import Batch
from moelab.moe.overrides import ByLayer, Remove
from moelab.moe.routing import LayerRecord, RoutingOverride
from moelab.nn.loss import token_cross_entropy
from moelab.nn.transformer import LayerState, TokenContext, Transformer
from moelab.training.precision import Precision


@dataclass(frozen=True)
class Counterfactual:
    """Routes changed in `layers`. `override(first, count)`: what routes windows `first` .. of the text."""

    layers: tuple[int, ...]
    override: Callable[[int, int], RoutingOverride]
    removes: Mapping[int, Sequence[int]] | None = None  # where it does nothing but remove these experts of these layers

    def touches(self, records: Mapping[int, LayerRecord]) -> bool:
        """Whether a batch with these records of the untouched model is changed by it."""
        if self.removes is None:
            return True
        return any(bool(records[layer].counts[list(mine)].sum() > 0) for layer, mine in self.removes.items())


def by_layer(overrides: Mapping[int, RoutingOverride]) -> Counterfactual:
    """One that knows no text: the same override for all windows."""
    together = ByLayer(overrides)
    return Counterfactual(tuple(sorted(overrides)), lambda first, count: together)


def removal(experts: Mapping[int, Sequence[int]], *, renormalise: bool = True) -> Counterfactual:
    """Without these experts, {layer: experts}; see `moe.overrides.Remove`."""
    one = by_layer({layer: Remove(frozenset(mine), renormalise) for layer, mine in experts.items()})
    return replace(one, removes={layer: tuple(mine) for layer, mine in experts.items()})


@dataclass(frozen=True)
class TokenLosses:
    """Of one batch: its loss as it is (`index` -1), or under the counterfactual of that index."""

    first: int  # window
    batch: Batch
    index: int
    loss: Tensor | None  # [B, S] float32 on the host; None: the same as the batch's own
    records: Sequence[LayerRecord] = ()  # of the untouched model


def losses(
    model: Transformer, batches: Iterable[Batch], precision: Precision, counterfactuals: Sequence[Counterfactual]
) -> Iterator[TokenLosses]:
    """For each batch its own losses, then those under each counterfactual, in order. Leaves the model in evaluation."""
    model.eval()
    starts = sorted({0, *(min(one.layers) for one in counterfactuals)})  # layers before which states are kept
    first = 0
    for batch in batches:
        part = batch.to(precision.device)
        with torch.no_grad(), precision.autocast():
            context = TokenContext(part.document_id, part.domain_id, attention_id=part.attention_id)
            before = {0: model.embed(part.input_ids, part.attention_mask, tokens=context)}
            own = before[0]
            for begin, end in pairwise(starts):
                own = before[end] = model.run_layers(own, begin, end)
            own = model.run_layers(own, starts[-1])
            yield TokenLosses(first, batch, -1, _loss(model, own, part.targets), own.records)
        by_id = {record.layer_id: record for record in own.records}
        count = len(batch.input_ids)
        for index, one in enumerate(counterfactuals):
            if not one.touches(by_id):
                yield TokenLosses(first, batch, index, None)
                continue
            lowest = min(one.layers)
            with torch.no_grad(), precision.autocast():
                state = before[lowest]
                info = replace(state.info, routing_override=one.override(first, count))
                changed = model.run_layers(replace(state, info=info, records=[]), lowest)
                told = _loss(model, changed, part.targets)
            yield TokenLosses(first, batch, index, told)
        first += count


def _loss(model: Transformer, state: LayerState, targets: Tensor) -> Tensor:
    return token_cross_entropy(model.norm(state.x), model.lm_head.weight, targets).float().cpu()
