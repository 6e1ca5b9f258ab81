"""Which matrices of a model get a low-rank product beside them, and of what shape: sizes alone, on any device.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang & Chen 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section
4.1: W + (alpha / r) B A, A random and B zero (the paper was not opened here; scale and both inits are those of PEFT
0.21.2, `LoraLayer.reset_lora_parameters` and `update_layer`). A stacked parameter, a bank's [E, rows, columns], holds E
matrices, each with a product of its own, as PEFT's `ParamWrapper` has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from moelab.config.adapters import KEY, AdapterConfig
from moelab.errors import ConfigError
from moelab.nn.names import matching


@dataclass(frozen=True)
class Target:
    """A parameter [..., rows, columns] that learns through left [..., rows, r] times right [..., r, columns]."""

    name: str
    parameter: nn.Parameter
    owner: nn.Module  # the module that holds it
    config: AdapterConfig
    input_first: bool  # rows are what it reads, as of a bank's `down`: then A is the left factor, B the right one

    @property
    def left(self) -> tuple[int, ...]:
        return (*self.parameter.shape[:-1], self.config.r)

    @property
    def right(self) -> tuple[int, ...]:
        return (*self.parameter.shape[:-2], self.config.r, self.parameter.shape[-1])

    @property
    def inputs(self) -> int:
        """How many numbers the matrix reads."""
        return self.parameter.shape[-2 if self.input_first else -1]

    @property
    def numbers(self) -> int:
        """In both factors."""
        rows, columns = self.parameter.shape[-2:]
        return self.parameter.numel() // (rows * columns) * self.config.r * (rows + columns)


def adapter_targets(model: nn.Module, chosen: Sequence[AdapterConfig]) -> list[Target]:
    """In the order of the model; of several patterns that match a name the last one counts, and a tied matrix is one.

    Raises ConfigError for a pattern that matches nothing, for what is no matrix, and for a rank above a matrix's.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    by_matrix: dict[int, AdapterConfig] = {}
    for index, one in enumerate(chosen):
        where = f"{KEY}.{index}"
        for name in sorted(matching(named, one.target, f"{where}.target")):
            _check(name, named[name], one, where)
            by_matrix[id(named[name])] = one
    found = []
    for name, parameter in model.named_parameters():
        if id(parameter) in by_matrix:
            path, _, own = name.rpartition(".")
            owner = model.get_submodule(path)
            first = own in getattr(owner, "INPUT_FIRST", ())
            found.append(Target(name, parameter, owner, by_matrix[id(parameter)], first))
    return found


def train_alone(model: nn.Module, targets: Sequence[Target]) -> None:
    """No parameter but the targets gets a gradient; it still passes through all."""
    adapted = {id(target.parameter) for target in targets}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in adapted)


def _check(name: str, parameter: nn.Parameter, one: AdapterConfig, where: str) -> None:
    shape = list(parameter.shape)
    if parameter.ndim < 2 or name.endswith("bias"):  # a bank's biases are E vectors
        raise ConfigError(
            f"{where}.target: '{one.target}' matches {name} {shape}, which is no matrix, so that there is no product "
            "of low rank to add; write a pattern of matrices alone, or one for each (*.weight, *.experts.down)"
        )
    if one.r > min(shape[-2:]):
        raise ConfigError(
            f"{where}.r: {one.r} is above the rank that {name} {shape} can have, {min(shape[-2:])}; take a smaller "
            "one, or train it whole"
        )
