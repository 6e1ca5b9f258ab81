"""A model of which each process holds its pieces alone, from the first: nowhere is there ever the whole of it.

`build_hollow` makes it without memory, `parallelise` cuts it, and here each process fills in what it keeps: drawn or
read one tensor after the other. What it takes at most is the pieces and one tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelab.nn.count import moe_blocks
from moelab.nn.init import draw, trim_pieces
from moelab.nn.transformer import Transformer
from moelab.stored_weights import StoredWeights, fill


def make_room(model: Transformer, device: torch.device) -> list[str]:
    """Give the pieces of a hollow model that was cut their memory; -> the parameters that have no values yet."""
    hollow = [name for name, parameter in model.named_parameters() if parameter.is_meta]

    def real(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    model._apply(real)
    model.tie_weights()
    return hollow


def fill_hollow(model: Transformer, hollow: list[str], stored: StoredWeights | None, std: float, seed: int) -> None:
    """Draw what is not `stored`, with the numbers of one process, and read the rest, buffers too."""
    drawn = [name for name in hollow if stored is None or name not in stored.shapes]
    for name in drawn:
        draw(model, name, std, seed)
    for block in moe_blocks(model):
        if any(model.get_parameter(name) is block.experts.down for name in drawn):
            trim_pieces(block.experts)
    if stored is not None:
        fill(model, stored)
