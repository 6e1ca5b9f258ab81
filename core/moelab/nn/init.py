"""One rule of initialisation: each parameter from a stream of its own name.

So two variants of a model start from the same bits wherever they share a parameter, whatever else they hold; and so a
process that holds a piece of a tensor draws the whole of it, one at a time, and keeps the piece.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from moelab.moe.experts import ExpertBank
from moelab.nn.attention import Attention
from moelab.nn.norm import RMSNorm
from moelab.nn.pieces import fill, first_of, held
from moelab.seeds import generator


@torch.no_grad()
def initialise(model: nn.Module, std: float, seed: int, stored: Collection[str] = ()) -> None:
    """Matrices and attention sinks ~ N(0, std^2) drawn in fp32, biases of Linears and experts 0, norms 1.

    A module that offers `initialise(generator)` (a plugin, say) does it itself, and one that offers
    `after_initialise()` has the last word on its own values;
    other vectors and scalars stay as their constructor made them. Parameters that are `stored` elsewhere are left out,
    and what is on the meta device stays there.
    """
    done: set[int] = set()
    for name, module in model.named_modules():
        custom = getattr(module, "initialise", None)
        if callable(custom):
            custom(generator(seed, "init", name))
            done |= {id(parameter) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in done and not parameter.is_meta and name not in stored:
            draw(model, name, std, seed)
    for module in model.modules():
        finish = getattr(module, "after_initialise", None)
        if isinstance(module, ExpertBank) and not module.down.is_meta:
            module.trim(module.gate_up, module.down)
        elif callable(finish):
            finish()


@torch.no_grad()
def draw(model: nn.Module, name: str, std: float, seed: int) -> None:
    """The rule for the parameter of this name; of one that lies in pieces, this process's own."""
    parameter, owner = model.get_parameter(name), model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, RMSNorm):
        held(parameter).fill_(1.0)
    elif isinstance(owner, nn.Linear | ExpertBank) and name.endswith("bias"):
        held(parameter).zero_()
    elif parameter.ndim > 1 or (isinstance(owner, Attention) and name.endswith(".sinks")):
        fill(parameter, torch.empty(parameter.shape).normal_(0.0, std, generator=generator(seed, "init", name)))


def trim_pieces(bank: ExpertBank) -> None:
    """`ExpertBank.trim` of the experts that this process holds; both its tensors are cut alike."""
    bank.trim(held(bank.gate_up.detach()), held(bank.down.detach()), first_of(bank.down)[0])


def release(module: nn.Module) -> None:
    """Move to the meta device what `draw` decides, so that it takes no memory until it is cut.

    What a constructor decides stays, and so does all of a module that has a say in its own values.
    """
    for name, owner in list(module.named_modules()):
        parents = [module.get_submodule(".".join(name.split(".")[:depth])) for depth in range(len(name.split(".")) + 1)]
        if any(hasattr(above, "initialise") or hasattr(above, "after_initialise") for above in parents):
            continue
        for key, parameter in list(owner.named_parameters(recurse=False)):
            decided = isinstance(owner, RMSNorm) or (isinstance(owner, nn.Linear) and key == "bias")
            if decided or parameter.ndim > 1:
                empty = torch.empty_like(parameter, device="meta")
                owner.register_parameter(key, nn.Parameter(empty, requires_grad=parameter.requires_grad))
