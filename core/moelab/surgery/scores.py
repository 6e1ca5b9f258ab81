"""What a layer's experts did on a text, in one pass: loads, who stands beside whom, REAP's saliency, mean outputs.

B windows of S tokens in a batch, T tokens, N assignments, E experts, D hidden size. The model is looked at through a
`RoutingOverride` that overrides nothing. Sums are float64 and wait for no device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial as bound

import numpy as np
import torch
from torch import Tensor

from moelab.data.batches import Batch
from moelab.errors import DataError
from moelab.moe.block import MoEBlock
from moelab.moe.routing import Routing, TokenInfo
from moelab.moe.surgery import KNOCKOUT, LOAD, OUTPUTS, SALIENCY, TOGETHER, Scores
from moelab.nn.transformer import TokenContext, Transformer
from moelab.routes.counterfactuals import losses, removal
from moelab.routes.trace import Trace
from moelab.training.precision import Precision

FROM_TRACE = frozenset({LOAD, TOGETHER})  # what routes alone tell
_PIECE = 1 << 14  # rows of an expert's input that are computed at once


@dataclass
class _Sums:
    tokens: int
    load: Tensor  # [E] float64, as all that follow
    together: Tensor  # [E, E]
    saliency: Tensor  # [E], of weight * |output|
    outputs: Tensor  # [E, D], of the outputs of all tokens


class Meter:
    """Hears of every MoE layer's tokens, and lets them go where they go."""

    def __init__(self, blocks: Mapping[int, MoEBlock], needs: Collection[str]) -> None:
        self.blocks, self.needs = blocks, needs
        self._sums: dict[int, _Sums] = {}

    @torch.no_grad()
    def __call__(self, layer_id: int, routing: Routing, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D], routing of its tokens -> the same routing. Padding counts nowhere."""
        block = self.blocks.get(layer_id)
        if block is not None:
            self._add(self._of(layer_id, routing, x), block, routing, x, info)
        return routing

    def scores(self) -> dict[int, Scores]:
        """{layer: what was found}."""
        found = {}
        for layer_id, sums in self._sums.items():
            load = sums.load.cpu().numpy()
            saliency = sums.saliency.cpu().numpy() / np.maximum(load, 1)
            found[layer_id] = Scores(
                sums.tokens,
                load=load,
                together=sums.together.cpu().numpy(),
                saliency=saliency if SALIENCY in self.needs else None,
                outputs=sums.outputs.cpu().numpy() / max(sums.tokens, 1) if OUTPUTS in self.needs else None,
            )
        return found

    def _of(self, layer_id: int, routing: Routing, x: Tensor) -> _Sums:
        if layer_id not in self._sums:
            experts, hidden = routing.num_experts, x.shape[-1]
            zeros = bound(torch.zeros, dtype=torch.float64, device=x.device)
            self._sums[layer_id] = _Sums(
                0, zeros(experts), zeros(experts, experts), zeros(experts), zeros(experts, hidden)
            )
        return self._sums[layer_id]

    def _add(self, sums: _Sums, block: MoEBlock, routing: Routing, x: Tensor, info: TokenInfo) -> None:
        chosen = replace(routing, choices=None).choice_map().double()  # [T, E], of those that are served
        sums.tokens += info.valid().numel()
        sums.load += routing.counts()
        sums.together += chosen.T @ chosen
        if SALIENCY in self.needs:
            real = info.valid().index_select(0, routing.token)
            counted = real if routing.served is None else real & routing.served
            norms = _outputs(block, x, routing.token, routing.expert).double().norm(dim=-1)  # [N]
            sums.saliency.index_add_(0, routing.expert, norms * routing.weight.double().abs() * counted)
        if OUTPUTS in self.needs:
            tokens = info.valid().nonzero().squeeze(-1)
            for expert in range(routing.num_experts):  # a look between steps, and every expert computes every token
                sums.outputs[expert] += _outputs(block, x, tokens, torch.full_like(tokens, expert)).double().sum(0)


def measure(
    model: Transformer,
    batches: Iterable[Batch],
    precision: Precision,
    layers: Collection[int],
    needs: Collection[str],
    *,
    seen: Callable[[], None] = lambda: None,
) -> dict[int, Scores]:
    """{layer: scores} of the model in evaluation; `seen` is called after each batch of the first pass.

    The knock-outs are a second pass, which costs as much as the model once for every expert of the layers.
    """
    model.eval()
    blocks = {b.layer_id: b for b in model.modules() if isinstance(b, MoEBlock) and b.layer_id in layers}
    meter, held = Meter(blocks, needs), list(batches)
    for batch in held:
        part = batch.to(precision.device)
        with torch.no_grad(), precision.autocast():
            tokens = TokenContext(part.document_id, part.domain_id, routing_override=meter)
            model.hidden_states(part.input_ids, part.attention_mask, tokens=tokens)
        seen()
    found = meter.scores()
    if KNOCKOUT in needs:
        costs = _knocked_out(model, held, precision, {i: b.layout.num_experts for i, b in blocks.items()})
        found = {layer: replace(scores, knockout=costs[layer]) for layer, scores in found.items()}
    return found


def from_trace(trace: Trace, experts: Mapping[int, int]) -> dict[int, Scores]:
    """Loads and who stands beside whom, of a recorded trace. `experts`: {layer: E}.

    Raises DataError where the trace lacks a layer, or is of other experts.
    """
    found = {}
    for layer_id, count in experts.items():
        layer = trace.layer(layer_id)
        if layer is None or layer.num_experts != count:
            told = "has no such layer" if layer is None else f"has {layer.num_experts} experts there"
            raise DataError(
                f"--trace: layer {layer_id} has {count} experts, and the trace {told}; trace this checkpoint"
            )
        token, expert, _ = layer.pairs()
        together = np.zeros((count, count))
        place = np.zeros((trace.tokens, count), np.float32)
        place[token, expert] = 1
        together = (place.T @ place).astype(np.float64)
        found[layer_id] = Scores(trace.tokens, load=layer.loads().astype(np.float64), together=together)
    return found


def _outputs(block: MoEBlock, x: Tensor, token: Tensor, expert: Tensor) -> Tensor:
    """What these experts make of these tokens, unweighted: token, expert [N] -> [N, D].

    Every assignment becomes a token of its own with one expert of weight 1, so the layer's own backend computes it.
    """
    found = []
    for tokens, experts in zip(token.split(_PIECE), expert.split(_PIECE), strict=True):
        ones = torch.ones(len(tokens), 1, dtype=torch.float32, device=x.device)
        alone = Routing.from_topk(experts[:, None], ones, block.layout.num_experts)
        found.append(block.routed(x.index_select(0, tokens), alone))
    return torch.cat(found) if found else x.new_zeros(0, x.shape[-1])


def _knocked_out(
    model: Transformer, batches: list[Batch], precision: Precision, experts: Mapping[int, int]
) -> dict[int, np.ndarray]:
    """{layer: [E] nats a token that the loss rises by without each expert}."""
    asked = [(layer, expert) for layer, count in experts.items() for expert in range(count)]
    added, tokens = np.zeros(len(asked)), 0
    own = torch.zeros(0)
    for found in losses(model, batches, precision, [removal({layer: [expert]}) for layer, expert in asked]):
        real = found.batch.targets >= 0
        if found.index < 0:
            assert found.loss is not None
            own = found.loss[real].double()
            tokens += own.numel()
        elif found.loss is not None:
            added[found.index] += float((found.loss[real].double() - own).sum())
    costs = {layer: np.zeros(count) for layer, count in experts.items()}
    for (layer, expert), cost in zip(asked, added, strict=True):
        costs[layer][expert] = cost / max(tokens, 1)
    return costs
