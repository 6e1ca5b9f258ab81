"""AdamW with the right decay groups, and its state as flat named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moelab.config.run import OptimizerConfig
from moelab.errors import CheckpointError


def build_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Matrices (two axes or more) decay; biases, norms and other vectors don't. A tied matrix counts once."""
    parameters = [p for p in model.parameters() if p.requires_grad]  # a shared parameter comes once
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    first, second = config.betas
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=(first, second), eps=config.eps, fused=True
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"<parameter>/<moment>": tensor}: the optimizer's state without pickle."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave. Raises CheckpointError for a parameter that is not the model's."""
    parameters = dict(model.named_parameters())
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"the checkpoint holds optimizer state of '{name}', which this model does not have")
        parameter = parameters[name]
        fits = value.shape in (parameter.shape, torch.Size([]))
        if not fits:
            raise CheckpointError(f"optimizer state '{path}' is {tuple(value.shape)}, not {tuple(parameter.shape)}")
        # AdamW's step count stays a scalar on the CPU unless fused on an accelerator wants it there.
        optimizer.state[parameter][key] = value.to(parameter.device).clone()
