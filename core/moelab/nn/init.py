"""One rule of initialisation: each parameter from a stream of its own name.

So two variants of a model start from the same bits wherever they share a parameter, whatever else they hold.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from moelab.nn.norm import RMSNorm
from moelab.seeds import generator


@torch.no_grad()
def initialise(model: nn.Module, std: float, seed: int, stored: Collection[str] = ()) -> None:
    """Matrices ~ N(0, std^2) drawn in fp32, Linear biases 0, norms 1.

    A module that offers `initialise(generator)` (a plugin, say) does it itself, and one that offers
    `after_initialise()` has the last word on its own values;
    other vectors and scalars stay as their constructor made them. Parameters that are `stored` elsewhere are left out.
    """
    done: set[int] = set()
    for name, module in model.named_modules():
        custom = getattr(module, "initialise", None)
        if callable(custom):
            custom(generator(seed, "init", name))
            done |= {id(parameter) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in done or name in stored:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, RMSNorm):
            parameter.fill_(1.0)
        elif isinstance(owner, nn.Linear) and name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim > 1:
            drawn = torch.empty(parameter.shape).normal_(0.0, std, generator=generator(seed, "init", name))
            parameter.copy_(drawn)
    for module in model.modules():
        finish = getattr(module, "after_initialise", None)
        if callable(finish):
            finish()
