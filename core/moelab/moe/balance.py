"""A balance loss as a run has it: under a name, on some layers, with a coefficient that may change over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moelab.config.scalars import settle
from moelab.config.typed import OPTIONS, KeyProblem
from moelab.errors import ConfigError
from moelab.moe.contracts import BalanceContext, BalanceLoss
from moelab.moe.routing import LayerRecord

SHAPES = ("linear", "cosine")
COMMON_KEYS = ("layers", "schedule")  # of every entry of `balance_losses`, beside the plugin's own options


@dataclass(frozen=True)
class WeightSchedule:
    """A factor on a loss' coefficient over optimizer steps: rise from 0, stay at 1, fall to `final`."""

    warmup_steps: int = 0  # steps of the rise
    decay_from: int | None = None  # first step of the fall; null: none
    decay_to: int | None = None  # the step from which on it is `final`; null: at once
    final: float = 0.0
    shape: str = "linear"  # of the fall: linear or cosine

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.final < 0:
            raise ValueError("warmup_steps and final must not be negative")
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, not '{self.shape}'")
        if self.decay_to is not None and (self.decay_from is None or self.decay_to < self.decay_from):
            raise ValueError(f"decay_to {self.decay_to} needs a decay_from that is not after it")

    def factor(self, step: int) -> float:
        """The factor at `step`, which counts from 0."""
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.decay_from is None or step < self.decay_from:
            return rise
        length = (self.decay_to if self.decay_to is not None else self.decay_from) - self.decay_from
        done = min(1.0, (step - self.decay_from) / length) if length else 1.0
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return rise * (1 + (self.final - 1) * done)


@dataclass(frozen=True)
class NamedLoss:
    """A balance loss and the tag it is logged under, unique within a run.

    The trainer calls it with the records of a micro-batch, and multiplies by `weight_at(step)`.
    """

    name: str
    loss: BalanceLoss
    where: str = "model.moe.balance_losses"  # its place in the config, for messages
    owner: str = ""  # the plugin's module
    layers: frozenset[int] | None = None  # None: all
    schedule: WeightSchedule = field(default_factory=WeightSchedule)

    def weight_at(self, step: int) -> float:
        """The coefficient at an optimizer step, which counts from 0."""
        return self.loss.weight * self.schedule.factor(step)

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """The unweighted value over its layers: a scalar. Raises ConfigError naming key, plugin and owner."""
        mine = [r for r in records if self.layers is None or r.layer_id in self.layers]
        try:
            value = self.loss(mine, context)
        except ConfigError as error:
            raise ConfigError(f"{self.where} ('{self.name}' of {self.owner}): {error}") from error
        if not isinstance(value, Tensor) or value.ndim != 0 or not value.is_floating_point():
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"{self.where} ('{self.name}' of {self.owner}): returned {found}, not a float scalar")
        return value

    def after_step(self, context: BalanceContext) -> None:
        """Let the loss adapt, if it does; the trainer calls this once after each optimizer step."""
        adapt = getattr(self.loss, "after_step", None)
        if adapt is not None:
            adapt(context)


def split_common(node: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str | None, WeightSchedule]:
    """An entry of `balance_losses` -> what is the plugin's own, its layer pattern, its schedule."""
    own = {key: value for key, value in node.items() if key not in COMMON_KEYS}
    pattern, given = node.get("layers"), node.get("schedule")
    try:
        schedule = OPTIONS.build(WeightSchedule, {} if settle(given) is None else given, (where, "schedule"))
    except KeyProblem:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}.schedule: {error}") from error
    return own, None if settle(pattern) is None else str(pattern), schedule


def router_gradient_shares(terms: Mapping[str, Tensor], router_parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """How much of the router's gradient comes from each term of the loss: {name: share}, summing to one.

    terms: {name: weighted scalar}, before any backward pass, whose graph stays alive. A share is the norm of the term's
    gradient over all router parameters by the sum of these norms: it says whether a coefficient is too large.
    Costs one backward pass through the model for each term, so for logging steps only.
    """
    norms = {}
    for name, value in terms.items():
        total = torch.zeros((), device=value.device)
        if value.requires_grad and router_parameters:  # a hash router has none
            gradients = torch.autograd.grad(value, list(router_parameters), retain_graph=True, allow_unused=True)
            for gradient in gradients:
                total = total if gradient is None else total + gradient.detach().float().square().sum()
        norms[name] = total.sqrt()
    whole = torch.stack(list(norms.values())).sum().clamp_min(1e-30) if norms else None
    return {} if whole is None else {name: norm / whole for name, norm in norms.items()}
