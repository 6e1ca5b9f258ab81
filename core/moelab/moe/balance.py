"""A balance loss as a run has it: under a name, on some layers, with a coefficient that may change over the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moelab.config.scalars import settle
from moelab.config.typed import OPTIONS, KeyProblem
from moelab.errors import ConfigError
from moelab.moe import promises
from moelab.moe.contracts import BalanceContext, BalanceLoss
from moelab.moe.routing import LayerRecord
from moelab.moe.schedule import WeightSchedule
from moelab.plugin_faults import PluginPart

COMMON_KEYS = ("layers", "schedule")  # of every entry of `balance_losses`, beside the plugin's own options


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
    ours: bool = False  # built in
    compute: Callable[..., Tensor] | None = None  # in place of the loss itself: the same, compiled

    def weight_at(self, step: int) -> float:
        """The coefficient at an optimizer step, which counts from 0."""
        return self.loss.weight * self.schedule.factor(step)

    @property
    def part(self) -> PluginPart:
        """How messages call it."""
        return PluginPart(
            "balance loss", self.name, self.owner or type(self.loss).__module__, self.where, ours=self.ours
        )

    def plugin_parts(self) -> list[tuple[PluginPart, object]]:
        """Who to blame for what the loss raises."""
        return [(self.part, self.loss)]

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """The unweighted value over its layers: a scalar. Raises ConfigError naming key, plugin and owner."""
        mine = [r for r in records if self.layers is None or r.layer_id in self.layers]
        try:
            value = (self.compute or self.loss)(mine, context)
        except ConfigError as error:
            raise ConfigError(f"{self.where} ('{self.name}' of {self.owner}): {error}") from error
        fault = promises.loss_value(value)
        if fault is not None:
            raise self.part.fault(fault, self.loss)
        return value

    def batch_count(self, record: LayerRecord) -> Tensor:
        """`BalanceLoss.batch_count` of one that has it."""
        counted: Tensor = self.loss.batch_count(record)  # type: ignore[attr-defined]
        return counted

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


def router_gradient_norms(terms: Mapping[str, Tensor], routers: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """How much of each router's gradient comes from each term of the loss: {name: norms [len(routers)]}.

    terms: {name: weighted scalar}, before any backward pass, whose graph stays alive; routers: the parameters of each.
    Costs one backward pass through the model for each term, so for logging steps only.
    """
    parameters = [parameter for router in routers for parameter in router]
    places = [index for index, router in enumerate(routers) for _ in router]
    norms = {}
    for name, value in terms.items():
        squares = torch.zeros(len(routers), device=value.device)
        if value.requires_grad and parameters:  # a hash router has none
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            for place, gradient in zip(places, gradients, strict=True):
                if gradient is not None:
                    squares[place] += gradient.detach().float().square().sum()
        norms[name] = squares.sqrt()
    return norms
