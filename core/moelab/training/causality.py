"""Does a part look at later tokens? Asked once, on a few tokens of the first batch, of every MoE layer.

A decoder that sees the future in training can't do so when it generates, and its losses look better than it is. Later
tokens are changed, and what earlier ones got must not change: their experts and weights (router), their output (backend
and shared expert). A router that is not causal by design says so (`Router.causal`), which needs
`model.moe.allow_noncausal`; what is found and was not said is refused without it, and told with it.

T tokens, D hidden size, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from moelab.moe.block import MoEBlock
from moelab.moe.routing import Routing, TokenInfo
from moelab.plugin_faults import PluginPart
from moelab.seeds import generator

logger = logging.getLogger("moelab")
# Relative to the largest value. Earlier rows are computed alike, so their rounding is; this is room for kernels that
# split sums by what else is there. Matmuls in bfloat16 keep 3 digits.
NEGLIGIBLE, NEGLIGIBLE_LOW = 1e-3, 2e-2
MODES = {True: "training", False: "evaluation"}


@dataclass(frozen=True)
class Causality:
    """The layers in which a token's treatment depends on later ones; what summary.json says."""

    # {"training": layers, "evaluation": layers}
    noncausal: dict[str, list[int]] = field(default_factory=lambda: {mode: [] for mode in MODES.values()})


@torch.no_grad()
def probe_causality(
    calls: Sequence[tuple[MoEBlock, Tensor, TokenInfo]], vocab_size: int, *, allowed: bool
) -> Causality:
    """calls: each MoE layer with an input of one sequence, x [T, D] and what is known of its tokens.

    Raises ConfigError naming the part that looks at later tokens unsaid, where that isn't `allowed`. The parts' buffers
    may have changed.
    """
    found = Causality()
    declared: dict[str, dict[str, list[int]]] = {}
    for block, x, info in calls:
        for training, mode in MODES.items():
            with block.gathered(), _mode(block, training), torch.random.fork_rng(devices=[]):
                fault = _fault(block, x, replace(info, training=training), vocab_size)
            said = not getattr(block.router, "causal" if training else "causal_in_evaluation", True)
            if fault is not None and not (said and fault[0] is block.parts["router"]) and not allowed:
                raise fault[0].fault(_refusal(fault[1], mode), _built(block, fault[0]))
            if fault is not None or said:
                found.noncausal[mode].append(block.layer_id)
                part = fault[0] if fault is not None else block.parts["router"]
                declared.setdefault(part.at(None).title, {}).setdefault(mode, []).append(block.layer_id)
    for title, modes in declared.items():
        logger.warning("%s", remark(title, modes))
    return found


def remark(title: str, modes: dict[str, list[int]]) -> str:
    """One line on what the losses of a run with such a part mean. modes: {"training": layers, "evaluation": layers}."""
    layers = ", ".join(map(str, sorted({layer for layers in modes.values() for layer in layers})))
    if modes.get("evaluation"):
        return (
            f"{title}, layer {layers}: looks at later tokens in evaluation too: its held-out loss is not comparable "
            "with that of a causal model, and generation will do worse"
        )
    return (
        f"{title}, layer {layers}: looks at later tokens in training: its training loss is not comparable with that of "
        "a causal model; its held-out loss is measured with what stands in for it in evaluation"
    )


def _refusal(found: str, mode: str) -> str:
    return (
        f"looks at later tokens in {mode}: {found} when only later ones change. Generation has none, so its losses "
        "would look better than the model is. Make it depend on earlier tokens alone; or, to study it, let it set "
        "causal=False (causal_in_evaluation=False), refuse to be built without context.allow_noncausal, and set "
        "model.moe.allow_noncausal=true"
    )


def _built(block: MoEBlock, part: PluginPart) -> object:
    return next(built for own, built in block.plugin_parts() if own is part)


def _fault(block: MoEBlock, x: Tensor, info: TokenInfo, vocab_size: int) -> tuple[PluginPart, str] | None:
    """The part of this layer whose answer for earlier tokens changes with later ones, and how."""
    cut = x.shape[0] // 2
    if not cut:
        return None
    router = block.parts["router"]
    routing = _route(block, x, info)
    if not _same(_map(_route(block, x, info)), _map(routing), NEGLIGIBLE):
        logger.warning("%s: two calls disagree, so whether it looks at later tokens can't be seen", router.title)
        return None
    served = routing.compact()
    for other, ids in _changed(x, info, cut, vocab_size):
        after, before = _map(_route(block, other, replace(info, token_id=ids)))[:cut], _map(routing)[:cut]
        if not _same(after, before, NEGLIGIBLE):
            return router, _difference(after, before, "weights of earlier tokens")
        for key, call in (("backend", partial(_compute, block, served)), ("shared_expert", block.shared_expert)):
            if call is None:
                continue
            after, before = call(other)[:cut], call(x)[:cut]
            if not _same(after, before, NEGLIGIBLE if before.dtype == torch.float32 else NEGLIGIBLE_LOW):
                return block.parts[key], _difference(after, before, "outputs of earlier tokens")
    return None


def _route(block: MoEBlock, x: Tensor, info: TokenInfo) -> Routing:
    """The router's answer; what it draws is the same in each call."""
    torch.manual_seed(0)
    noise = None if info.generator is None else generator(0, "causality", device=info.generator.device)
    routing: Routing = block.router(x, replace(info, generator=noise))
    return routing


def _compute(block: MoEBlock, routing: Routing, x: Tensor) -> Tensor:
    return block.routed(x, routing)


def _changed(x: Tensor, info: TokenInfo, cut: int, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """x [T, D] and token ids [T] with other tokens from `cut` on: random ones, and the first token again and again.

    The second makes later tokens compete for the experts of the first.
    """
    noise = torch.randn(x.shape, generator=generator(0, "later tokens")).to(x)
    spread = x.float().std().clamp_min(1e-3).to(x.dtype)
    for values, ids in (
        (noise * spread * 2 + x.roll(1, 0), (info.token_id + 1 + torch.arange(len(x), device=x.device)) % vocab_size),
        (x[:1].expand_as(x), info.token_id[:1].expand_as(info.token_id)),
    ):
        yield torch.cat([x[:cut], values[cut:]]), torch.cat([info.token_id[:cut], ids[cut:]])


def _map(routing: Routing) -> Tensor:
    """[T, E (+ D)]: all that a routing does to each token; which experts, at which weight, and what passes by."""
    experts = torch.zeros(routing.num_tokens, routing.num_experts, dtype=torch.float64, device=routing.weight.device)
    served = routing.compact()
    experts.index_put_((served.token, served.expert), served.weight.detach().double(), accumulate=True)
    return experts if routing.bypass is None else torch.cat([experts, routing.bypass.double()], dim=1)


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Up to rounding; NaN is told elsewhere."""
    a, b = a.double(), b.double()
    size = torch.maximum(a.abs().max(), b.abs().max()).clamp_min(1e-30) if a.numel() else 1.0
    return not bool(((a - b).abs() / size > tolerance).any())


def _difference(a: Tensor, b: Tensor, what: str) -> str:
    return f"{what} change by {float((a - b).abs().max()):.3g}"


@contextmanager
def _mode(block: MoEBlock, training: bool) -> Iterator[None]:
    """The layer's parts in training or evaluation, and as they were after it."""
    parts = [part for _, part in block.plugin_parts() if isinstance(part, nn.Module)]
    before = [part.training for part in parts]
    for part in parts:
        part.train(training)
    try:
        yield
    finally:
        for part, was in zip(parts, before, strict=True):
            part.train(was)
