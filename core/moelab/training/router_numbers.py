"""Numbers of each router that its records do not hold: its gradient beside the model's, and experts that stand idle."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from moelab.alarms import NO_GRADIENT, LayerFacts
from moelab.moe.block import MoEBlock
from moelab.nn.transformer import Transformer
from moelab.training.adapters import Adapters
from moelab.training.router_gradient import learns
from moelab.training.step import StepResult, router_parameters

TEXT = "lm_loss"  # the term that is the text's
LEAST_SHARE = 10  # assignments: where a fair share of an interval is fewer, chance alone leaves experts without


def layer_facts(blocks: Sequence[MoEBlock], *, untrained: bool, frozen: Collection[int] = ()) -> dict[int, LayerFacts]:
    """What alarms go by, for each MoE layer; `untrained`: no training has touched the routers before this run.

    `frozen`: layers whose router the config keeps as it is. One that was trained before is no fault then: summary.json
    names it (`frozen_routers`), and `compare` says so with every word that it gives to the run.
    """
    found = {}
    for block in blocks:
        layout, weight = block.layout, getattr(block.router, "weight", None)
        choices = len(weight) if weight is not None else None
        to_learn = learns(block.router) and (untrained or block.layer_id not in frozen)
        found[block.layer_id] = LayerFacts(layout.num_experts, layout.num_experts_per_tok, to_learn, untrained, choices)
    return found


def gradient_metrics(
    model: Transformer, blocks: Sequence[MoEBlock], result: StepResult, adapters: Adapters | None = None
) -> dict[str, float]:
    """Norm and ratio of each router's gradient, and what share of it is the text's. Waits for the device.

    Of a router that learns through adapters, theirs; of its shares, those in the gradient of its own parameters.
    """
    if result.router_norms is None:
        return {}
    norms, whole = result.router_norms.tolist(), float(result.grad_norm)
    groups = [adapters.of(group) if adapters else group for group in router_parameters(model)]
    sizes = [sum(p.numel() for p in group) for group in groups]
    learning = sum(p.numel() for p in (adapters or model).parameters() if p.requires_grad)
    of_all = whole / math.sqrt(learning)  # root mean square
    metrics = {"train/router_grad_norm": math.hypot(*norms)}
    taught = []  # where the gradient is more than rounding: elsewhere a share of it says nothing
    for index, (block, norm, size) in enumerate(zip(blocks, norms, sizes, strict=True)):
        if learns(block.router):
            prefix = f"moe/layer_{block.layer_id:02d}/"
            metrics[prefix + "router_grad_norm"] = norm
            if of_all > 0:
                ratio = metrics[prefix + "router_gradient_ratio"] = norm / math.sqrt(max(size, 1)) / of_all
                taught += [index] if ratio >= NO_GRADIENT else []
    by_term = {name: value.tolist() for name, value in result.gradient_norms.items()}
    return metrics | _shares(blocks, by_term, taught)


def _shares(blocks: Sequence[MoEBlock], norms: Mapping[str, list[float]], taught: Sequence[int]) -> dict[str, float]:
    """norms: {term: [layers]}. Of all routers together for each term, and the text's share for each layer."""
    together = {name: math.hypot(*values) for name, values in norms.items()}
    whole = sum(together.values())
    metrics = {f"train/router_gradient_share/{name}": value / whole for name, value in together.items() if whole > 0}
    for index in taught if TEXT in norms else ():
        total = sum(values[index] for values in norms.values())
        if total > 0:
            metrics[f"moe/layer_{blocks[index].layer_id:02d}/text_gradient_share"] = norms[TEXT][index] / total
    return metrics


def idle_metrics(blocks: Sequence[MoEBlock], counts: Sequence[int]) -> dict[str, float]:
    """The share of experts without a token since the last log; counts: expert after expert, layer after layer.

    Nothing of a layer whose fair share is below LEAST_SHARE assignments.
    """
    metrics, begin = {}, 0
    for block in blocks:
        mine = counts[begin : begin + block.layout.num_experts]
        begin += block.layout.num_experts
        if mine and sum(mine) >= LEAST_SHARE * len(mine):
            metrics[f"moe/layer_{block.layer_id:02d}/idle_fraction"] = sum(count == 0 for count in mine) / len(mine)
    return metrics
