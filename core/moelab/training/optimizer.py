"""The optimizer that a config names, AdamW as torch has it, and an optimizer's state as flat named tensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moelab.config.run import OptimizerConfig
from moelab.errors import CheckpointError
from moelab.hookspecs import OPTIMIZERS
from moelab.nn.compiler_cache import ensure_compiler_cache
from moelab.nn.optimizing import Kept, Optimizer, OptimizerContext, each, kept_by, kept_of, trained_parameters
from moelab.nn.pieces import read_as
from moelab.plugin_faults import article
from moelab.registry import Registry
from moelab.tensor_parts import Stored
from moelab.training.rounded import RoundedAdamW

logger = logging.getLogger("moelab")

SCALAR = torch.Size([])
_CURE = "; use an earlier checkpoint, or restore it"


class AdamW(torch.optim.AdamW):
    """torch's own, which says what it holds."""

    def kept(self, group: Mapping[str, Any]) -> Kept:
        return Kept(dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.float32))


def build_optimizer(context: OptimizerContext, registry: Registry) -> Optimizer:
    """What `optimizer.algorithm` names. Raises ConfigError for what can't be, with the place in a plugin at fault.

    Its rate is set; whoever trains with it calls `begin` before the first step.
    """
    ensure_compiler_cache()
    node = context.settings.algorithm
    optimizer = registry.build(OPTIMIZERS, node, context, OPTIMIZERS.key)
    fault = optimizer_fault(optimizer, context)
    if fault is not None:
        raise registry.part(OPTIMIZERS, node, OPTIMIZERS.key).fault(
            fault, registry.select(OPTIMIZERS, node, OPTIMIZERS.key)[0].build
        )
    set_learning_rate(optimizer, context.settings.lr)
    return optimizer


def begin(optimizer: Optimizer) -> None:
    """Let it read what is long to read. Raises UserError for what can't be read."""
    getattr(optimizer, "begin", lambda: None)()


def optimizer_fault(optimizer: object, context: OptimizerContext) -> str | None:
    """What is wrong with what a plugin built; None where it keeps its contract as far as can be seen."""
    if not isinstance(optimizer, Optimizer):
        return f"returned {article(optimizer)}; it must return a torch.optim.Optimizer"
    nameless = [group for group in optimizer.param_groups if "param_names" not in group or "factor" not in group]
    if nameless:
        return "has a parameter group without names or `factor`; make them with context.groups()"
    of = {id(one.parameter): one for one in context.trained}
    found = [(id(parameter), name, group["factor"]) for group, name, parameter in each(optimizer)]
    for key, name, factor in found:
        if key not in of:
            return f"steps '{name}', which is not trained"
        if (of[key].name, of[key].factor) != (name, factor):
            return f"calls '{of[key].name}' '{name}' with factor {factor}, which is {of[key].factor}"
    missing = sorted({one.name for one in context.trained} - {name for _, name, _ in found})
    return f"leaves out {', '.join(missing[:3])}; every trained parameter lies in a group" if missing else None


def adamw(context: OptimizerContext) -> Optimizer:
    """AdamW of all that is trained; where parameters or moments are bf16, it rounds them at random."""
    settings = context.settings
    first, second = settings.betas
    if context.narrow:
        return RoundedAdamW(
            context.groups(), lr=settings.lr, betas=(first, second), eps=settings.eps, moments=context.moments,
            seed=context.seed,
        )  # fmt: skip
    return AdamW(context.groups(), lr=settings.lr, betas=(first, second), eps=settings.eps, fused=True)


def build_adamw(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Matrices (two axes or more) decay; biases, norms and other vectors don't. A tied matrix counts once.

    `model`: what is trained, which may be the adapters of one. A group's `factor` is that of its parameters' learning
    rate. Raises ConfigError for a pattern that matches nothing.
    """
    return adamw(OptimizerContext(trained_parameters(model, config.learning_rates), config))


def state_bytes(optimizer: Optimizer, *, stored: bool = False) -> int:
    """What it holds beside the parameters, or what of that goes into a checkpoint, counted from their shapes."""
    total = 0
    for group, _, parameter in each(optimizer):
        kept = kept_of(optimizer, group)
        of_one = kept.bytes_each - (kept.beside if stored else 0)
        total += of_one * parameter.numel()
    return total


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of each group: times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """{"<parameter>/<moment>": tensor}: the optimizer's state without pickle."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def restore_optimizer(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Stored]) -> None:
    """Put back what `optimizer_tensors` gave, as it is stored; each process reads its own pieces.

    Raises CheckpointError for a parameter that is not the model's, and for a state of one that is not all, and only,
    the optimizer's. A parameter without any is told: the optimizer begins anew with it, as with one that never had a
    gradient.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: dict[str, dict[str, Stored]] = {}
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"holds optimizer state of '{name}', which this model does not train{_CURE}")
        found.setdefault(name, {})[key] = value
    for group, name, parameter in each(optimizer):
        if name in found:
            _check_state(name, parameter, found[name], kept_by(optimizer, group))
    without = sorted(parameters.keys() - found.keys()) if found else []
    if without:
        shown = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
        kind = type(optimizer).__name__
        logger.warning("the checkpoint holds no optimizer state of %s: %s begins anew with it", shown, kind)
    for name, moments in found.items():
        for key, value in moments.items():
            # AdamW's step count stays a scalar on the CPU unless fused on an accelerator wants it there.
            parameter = parameters[name]
            scalar = value.shape == SCALAR
            restored = value.read().to(parameter.device) if scalar else read_as(value, parameter)
            optimizer.state[parameter][key] = restored
    complaint = getattr(optimizer, "restored", lambda: None)()
    if complaint:
        raise CheckpointError(f"{complaint}{_CURE}")


def _check_state(name: str, parameter: Tensor, found: Mapping[str, Stored], kept: Kept | None) -> None:
    """Raises CheckpointError where what is stored of a parameter can't be this optimizer's."""
    for key, value in found.items():
        scalar = key in kept.scalars if kept else value.shape == SCALAR
        wanted = SCALAR if scalar else parameter.shape
        if value.shape != wanted:
            raise CheckpointError(f"'{name}/{key}' is {list(value.shape)}, not {list(wanted)}{_CURE}")
    wanted_keys = kept.stored.keys() | kept.scalars if kept else found.keys()
    if found.keys() != wanted_keys:
        missing, foreign = sorted(wanted_keys - found.keys()), sorted(found.keys() - wanted_keys)
        raise CheckpointError(f"optimizer state of '{name}' lacks {missing} and holds {foreign} beside{_CURE}")
