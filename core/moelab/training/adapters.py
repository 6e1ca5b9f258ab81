"""Matrices that learn through a product of low rank (`train.adapters`), while all else stays as it is.

The model never hears of it. A parameter of it is at all times the sum, W = base + (alpha / r) B A, under its own name:
the backward pass leaves its gradient G there, which is turned at once into those of the factors, (alpha / r) G A^T and
(alpha / r) B^T G, and freed; the optimizer steps the factors, and the sum is made anew. By the chain rule these are
LoRA's own gradients. So every backend, router and observer sees plain parameters; whatever reads a checkpoint reads the
merged weights, which are those that were trained, to the bit; and no forward pass pays anything.

Why not PEFT, whose `target_parameters` attach to a bank too (0.21.2): it wraps modules, a wrapper around a wrapper for
a bank's second matrix, so that names, checkpoints and what reads `block.experts` change; it forms W + B A in each
forward pass, evaluation included; and it knows one orientation for all matrices of a module (`is_transposed`), where a
bank's `gate_up` and `down` have two. Its numbers are held against these in tests/optional/test_peft.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from moelab.config.adapters import KEY, AdapterConfig
from moelab.errors import CheckpointError
from moelab.moe.experts import ExpertBank
from moelab.nn.low_rank import Target, adapter_targets, train_alone
from moelab.seeds import generator
from moelab.tensor_parts import Stored

logger = logging.getLogger("moelab")


class Adapter(nn.Module):
    """Of one parameter W [..., rows, columns]: `base`, its value before, and the factors lora_a and lora_b.

    Of a matrix [out, in] lora_b [..., out, r] is the left factor and lora_a [..., r, in] the right one; of one that is
    stored as [in, out] it is the other way round.
    """

    base: Tensor
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def __init__(self, target: Target, seed: int) -> None:
        super().__init__()
        parameter, one = target.parameter, target.config
        self.scale = one.alpha / one.r
        self._input_first = target.input_first
        self._merged = (parameter,)  # in a tuple, so that it stays the model's parameter and is none of this module
        shapes = target.left, target.right
        drawn, zero = shapes if target.input_first else shapes[::-1]
        values = _drawn(target, torch.empty(drawn), generator(seed, KEY, target.name))
        if isinstance(target.owner, ExpertBank) and parameter is target.owner.down:
            target.owner.trim(torch.empty(*target.owner.gate_up.shape[:2], 0), values)  # what evens widths out stays 0
        self.lora_a = nn.Parameter(values.to(parameter))
        self.lora_b = nn.Parameter(parameter.new_zeros(zero))
        self.register_buffer("base", parameter.detach().clone())
        parameter.register_post_accumulate_grad_hook(self._take)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Left and right."""
        return (self.lora_a, self.lora_b) if self._input_first else (self.lora_b, self.lora_a)

    @property
    def merged(self) -> nn.Parameter:
        """The model's parameter."""
        return self._merged[0]

    @torch.no_grad()
    def merge(self) -> None:
        """Set the model's parameter to base + (alpha / r) B A."""
        base, left, right = (t.detach().reshape(-1, *t.shape[-2:]) for t in (self.base, *self.factors))
        torch.baddbmm(base, left, right, alpha=self.scale, out=self.merged.detach().view_as(base))

    @torch.no_grad()
    def begin(self) -> None:
        """Take what the model holds now as base."""
        self.base.copy_(self.merged)

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        """After each backward pass: the gradient of the sum becomes that of the factors, and its memory is free."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        left, right = self.factors
        for factor, found in ((left, gradient @ right.mT), (right, left.mT @ gradient)):
            found.mul_(self.scale)
            factor.grad = found if factor.grad is None else factor.grad.add_(found)


class Adapters(nn.Module):
    """All of a model. Parameters are called as the model's, with .lora_a and .lora_b behind."""

    def __init__(self, targets: Sequence[Target], seed: int) -> None:
        super().__init__()
        for target in targets:
            *path, own = target.name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module(own, Adapter(target, seed))

    def each(self) -> Iterator[Adapter]:
        return (module for module in self.modules() if isinstance(module, Adapter))

    @property
    def numbers(self) -> int:
        """That are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on each of its steps is followed by `merge`."""
        optimizer.register_step_post_hook(lambda *_: self.merge())

    def merge(self) -> None:
        """Set all of the model's parameters to their sums."""
        for adapter in self.each():
            adapter.merge()

    def of(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """What is trained in place of these parameters of the model."""
        wanted = {id(parameter) for parameter in parameters}
        return [factor for one in self.each() if id(one.merged) in wanted for factor in one.factors]

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the merged weights."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    @torch.no_grad()
    def restore(self, stored: Mapping[str, Stored]) -> None:
        """What `tensors` gave, after the model is filled; without any, as of weights that were operated on, anew.

        Raises CheckpointError for one that is missing, foreign or of another shape, with nothing done.
        """
        if not stored:
            logger.warning("%s: the checkpoint holds none, so they begin anew on its weights", KEY)
            for adapter in self.each():
                adapter.begin()
            return
        own = self.tensors()
        differing = sorted(
            name
            for name in own.keys() | stored.keys()
            if name not in own or name not in stored or tuple(stored[name].shape) != tuple(own[name].shape)
        )
        if differing:
            raise CheckpointError(
                f"'{differing[0]}' is missing, of another shape, or no adapter of this run; use an earlier checkpoint, "
                "or restore it"
            )
        for name, tensor in own.items():
            tensor.copy_(stored[name].read())


def attach(model: nn.Module, chosen: Sequence[AdapterConfig], seed: int) -> Adapters | None:
    """The adapters of `train.adapters` on a model that is filled; all else of it is frozen. None where none is chosen.

    Raises ConfigError as `adapter_targets`.
    """
    if not chosen:
        return None
    targets = adapter_targets(model, chosen)
    train_alone(model, targets)
    logger.warning(
        "%s: %s numbers are trained, in adapters of %d matrices or stacks of them (%s numbers); all %s parameters of "
        "the model stay as they are beneath",
        KEY,
        f"{sum(target.numbers for target in targets):,}",
        len(targets),
        f"{sum(target.parameter.numel() for target in targets):,}",
        f"{sum(parameter.numel() for parameter in model.parameters()):,}",
    )
    return Adapters(targets, seed)


@torch.no_grad()
def _drawn(target: Target, values: Tensor, stream: torch.Generator) -> Tensor:
    """The factor that begins at random, on the CPU, so that it is the same on every device."""
    if target.config.init == "gaussian":
        return values.normal_(0.0, 1.0 / target.config.r, generator=stream)
    bound = 1.0 / math.sqrt(target.inputs)  # nn.Linear's own
    return values.uniform_(-bound, bound, generator=stream)
