"""Does the text teach the router? Asked once, before a run: of the weights that each router gives to a few tokens.

The language model's loss reaches a router through nothing but the weights of its assignments and its bypass. Where
these do not depend on its parameters (one normalised weight is always 1; a weight may be detached), the router learns
nothing from the text, and no other number of a run says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from moelab.alarms import RULE_OF, Alarm
from moelab.config.model import ModelConfig
from moelab.config.run import TrainConfig
from moelab.moe.block import MoEBlock
from moelab.moe.per_layer import layer_parts
from moelab.moe.routing import TokenInfo
from moelab.seeds import generator

logger = logging.getLogger("moelab")
NEARBY = 0.02  # parameters are asked at a point so far from where they are: a matrix of zeros hides what precedes it
# What divides out is left as the rounding of its parts, near 1e-7; a router that learns has 1e-2 and more.
NEGLIGIBLE = 1e-5


@contextmanager
def watch_routers(blocks: Sequence[MoEBlock]) -> Iterator[dict[int, tuple[Tensor, TokenInfo]]]:
    """{layer: what its router was last called with}, filled by the forward passes inside the block."""
    calls: dict[int, tuple[Tensor, TokenInfo]] = {}
    handles = []
    for block in blocks:
        if isinstance(block.router, nn.Module):

            def note(module: nn.Module, inputs: Any, layer_id: int = block.layer_id) -> None:
                calls[layer_id] = inputs

            handles.append(block.router.register_forward_pre_hook(note))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def warn_of_untaught_routers(
    config: ModelConfig, blocks: Sequence[MoEBlock], calls: Mapping[int, tuple[Tensor, TokenInfo]]
) -> list[Alarm]:
    """One line a config key for routers that get no gradient from the text, and an alarm for each layer of it.

    `calls` of `watch_routers`. A frozen router is told too, unless it says that it `learns` nothing.
    """
    if config.moe is None:
        return []
    frozen = [_alarm("no_gradient", block.layer_id) for block in blocks if learns(block.router) and is_frozen(block)]
    parts = layer_parts(config.moe, config.num_hidden_layers)
    untaught: dict[str, list[int]] = {}
    for block in blocks:
        call = calls.get(block.layer_id)
        with block.gathered():
            deaf = call is not None and isinstance(block.router, nn.Module) and not hears_the_text(block.router, *call)
        if deaf:
            untaught.setdefault(parts[block.layer_id].where("router"), []).append(block.layer_id)
    for where, layers in untaught.items():
        logger.warning(
            "%s, layer %s: the text gives this router no gradient: the weights that it returns do not depend on its "
            "matrix, so balance losses alone teach it, if any do. One normalised weight is always 1: with one expert a "
            "token set norm_topk_prob=false, or take more experts; weights of a router of yours must keep their graph",
            where,
            ", ".join(map(str, layers)),
        )
    if frozen:
        logger.warning(
            "model.moe.router, layer %s: no parameter of this router is trainable, so it learns nothing: train.freeze "
            "or train.adapters does that, or the router itself; a router of yours that is meant so says it with "
            "`learns = False`",
            ", ".join(str(alarm.layer) for alarm in frozen),
        )
    _warn_of_idle_backends(blocks)
    return frozen + [_alarm("untaught", layer) for layers in untaught.values() for layer in layers]


def _warn_of_idle_backends(blocks: Sequence[MoEBlock]) -> None:
    """A line for those that compute every expert for a router that has nothing to learn."""
    idle = [b for b in blocks if getattr(b.backend, "computes_every_expert", False) and not learns(b.router)]
    if idle:
        logger.warning(
            "model.moe.backend, layer %s: %s lets a router hear of every expert, and the router here has nothing to "
            "learn: it computes what the backend inside it does, and no more",
            ", ".join(str(block.layer_id) for block in idle),
            idle[0].backend.name,
        )


def learns(router: object) -> bool:
    """Whether a router is to learn: what it declares, else whether it has a parameter at all."""
    declared = getattr(router, "learns", None)
    return bool(declared) if declared is not None else any(True for _ in _parameters(router))


def is_frozen(block: MoEBlock) -> bool:
    """Whether its router has nothing that a gradient moves."""
    return not any(parameter.requires_grad for parameter in _parameters(block.router))


def frozen_by_config(model: nn.Module, blocks: Sequence[MoEBlock], train: TrainConfig) -> dict[int, str]:
    """{layer: the config key that keeps its router as it is}, of routers that are to learn and have nothing trainable.

    Another that has nothing trainable froze itself, without a word (`learns = False`) or a key of the config.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    matched = {id(named[name]) for pattern in train.freeze for name in named if fnmatchcase(name, pattern)}
    key = "train.adapters" if train.adapters else "train.freeze"
    return {
        block.layer_id: key
        for block in blocks
        if learns(block.router) and is_frozen(block)
        and (train.adapters or all(id(parameter) in matched for parameter in _parameters(block.router)))
    }  # fmt: skip


def _parameters(router: object) -> Iterator[nn.Parameter]:
    return router.parameters() if isinstance(router, nn.Module) else iter(())


def _alarm(name: str, layer: int) -> Alarm:
    """Found before the first step: its value is exactly nothing."""
    rule = RULE_OF[name]
    assert isinstance(rule.threshold, float), name
    return Alarm(name, layer, 0.0, rule.threshold, rule.advice)


def hears_the_text(router: nn.Module, x: Tensor, info: TokenInfo) -> bool:
    """Whether the weights of a router's assignments depend on its parameters, and on its projection where it has one.

    x [T, D], info: a call of it. The measure has no unit: by what share of itself an output changes, to first order,
    when each parameter moves at random by its own size. True for a router without trainable parameters, and where no
    token got an expert, which says nothing. The router's parameters are as before; its buffers may have changed.
    """
    named = {name: p for name, p in router.named_parameters() if p.requires_grad}
    if not named:
        return True
    judged = False
    projection = 0.0
    whole = 0.0
    with _nearby(list(named.values())), torch.enable_grad():
        routing = router(x.detach(), info)
        for index, output in enumerate((routing.weight, routing.bypass)):
            if output is None or not bool(output.detach().any()):
                continue
            judged = True
            share = _sensitivity(output, named, index)
            whole = max(whole, sum(value**2 for value in share.values()) ** 0.5)
            projection = max(projection, share.get("weight", whole))
    return not judged or (whole > NEGLIGIBLE and projection > NEGLIGIBLE)


def _sensitivity(output: Tensor, named: Mapping[str, nn.Parameter], index: int) -> dict[str, float]:
    """{parameter: the relative change of `output` when it moves at random by its own root mean square}."""
    if not output.requires_grad:
        return dict.fromkeys(named, 0.0)
    # Random signs: a plain sum of normalised weights is constant, though each of them is not.
    signs = torch.randn(output.shape, generator=generator(0, "router gradient", index)).to(output)
    gradients = torch.autograd.grad((output * signs).sum(), list(named.values()), retain_graph=True, allow_unused=True)
    size = float(output.detach().double().norm())
    found = {}
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        step = float(parameter.detach().double().square().mean().sqrt())
        found[name] = 0.0 if gradient is None else float(gradient.double().norm()) * step / size
    return found


@contextmanager
def _nearby(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters moved by noise of size NEARBY inside the block, and exactly as they were after it."""
    kept = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            noise = torch.randn(parameter.shape, generator=generator(0, "router nearby", index))
            parameter.add_((NEARBY * noise).to(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
