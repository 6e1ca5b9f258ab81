"""AdamW with the right decay groups, and its state as flat named tensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moelab.config.run import OptimizerConfig
from moelab.errors import CheckpointError
from moelab.nn.names import matching
from moelab.nn.pieces import read_as
from moelab.tensor_parts import Stored
from moelab.training.rounded import RoundedAdamW

logger = logging.getLogger("moelab")

LEARNING_RATES = "optimizer.learning_rates"
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # torch.optim.AdamW's state of a parameter, without amsgrad
_CURE = "; use an earlier checkpoint, or restore it"


def build_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Matrices (two axes or more) decay; biases, norms and other vectors don't. A tied matrix counts once.

    `model`: what is trained, which may be the adapters of one. A group's `factor` is that of its parameters' learning
    rate. Where parameters or moments are bf16, it rounds them at
    random. Raises ConfigError for a pattern that matches nothing.
    """
    factors = learning_rate_factors(model, config.learning_rates)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]  # a shared parameter comes once
    groups = [
        {
            "params": [(n, p) for n, p in named if _decays(n, p) == matrices and factors.get(n, 1.0) == factor],
            "weight_decay": config.weight_decay if matrices else 0.0,
            "factor": factor,
        }
        for factor in sorted({1.0, *factors.values()})
        for matrices in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    first, second = config.betas
    moments = getattr(torch, config.moments_dtype)
    if torch.bfloat16 in (moments, *(p.dtype for _, p in named)):
        return RoundedAdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps, moments=moments)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=True)


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and not name.endswith("bias")


def learning_rate_factors(model: nn.Module, patterns: Mapping[str, float]) -> dict[str, float]:
    """{parameter: factor} of those that a pattern matches, of several the last; a tied matrix has both its names.

    Raises ConfigError for a pattern that matches nothing.
    """
    by_name = dict(model.named_parameters(remove_duplicate=False))
    found: dict[int, float] = {}
    for pattern, factor in patterns.items():
        found |= dict.fromkeys((id(by_name[name]) for name in matching(by_name, pattern, LEARNING_RATES)), factor)
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of each group: times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"<parameter>/<moment>": tensor}: the optimizer's state without pickle."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Stored]) -> None:
    """Put back what `optimizer_tensors` gave, as it is stored; each process reads its own pieces.

    Raises CheckpointError for a parameter that is not the model's, and for moments of one that are not all, and only,
    AdamW's. A parameter without any is told: AdamW begins anew with it, as with one that never had a gradient.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: dict[str, dict[str, Stored]] = {}
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"holds optimizer state of '{name}', which this model does not train{_CURE}")
        wanted = torch.Size([]) if key == "step" else parameters[name].shape
        if value.shape != wanted:
            raise CheckpointError(f"'{path}' is {list(value.shape)}, not {list(wanted)}{_CURE}")
        found.setdefault(name, {})[key] = value
    for name, moments in found.items():
        if moments.keys() != MOMENTS:
            missing, foreign = sorted(MOMENTS - moments.keys()), sorted(moments.keys() - MOMENTS)
            raise CheckpointError(f"optimizer state of '{name}' lacks {missing} and holds {foreign} beside{_CURE}")
    without = sorted(parameters.keys() - found.keys()) if found else []
    if without:
        shown = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
        logger.warning("the checkpoint holds no optimizer state of %s: AdamW begins anew with it", shown)
    for name, moments in found.items():
        for key, value in moments.items():
            # AdamW's step count stays a scalar on the CPU unless fused on an accelerator wants it there.
            parameter = parameters[name]
            optimizer.state[parameter][key] = (
                value.read().to(parameter.device) if key == "step" else read_as(value, parameter)
            )
