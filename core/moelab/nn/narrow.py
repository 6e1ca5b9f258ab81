"""A model that is kept in bf16 while it is trained, but for what must decide finely."""

from __future__ import annotations

import torch
from torch import nn

from moelab.nn.count import moe_blocks
from moelab.nn.transformer import Transformer


def narrow(model: Transformer) -> None:
    """Matrices (two axes or more) become bf16, one after the other; vectors and routers stay, which decide near ties.

    A tied matrix is one parameter and stays one.
    """
    routers = [block.router for block in moe_blocks(model) if isinstance(block.router, nn.Module)]
    kept = {id(parameter) for router in routers for parameter in router.parameters()}
    for parameter in model.parameters():
        if parameter.ndim >= 2 and id(parameter) not in kept:
            parameter.data = parameter.data.to(torch.bfloat16)
