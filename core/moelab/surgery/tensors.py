"""A plan on one tensor: experts of the bank, rows of the router, and the optimizer's moments of both.

E experts of F neurons become E' of F'. One tensor is read, one is made; of no model more than that is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab.errors import ConfigError
from moelab.moe.surgery import ExpertRows, LayerPlan, NewExpert
from moelab.seeds import generator
from moelab.tensor_parts import Shape, Stored

GATE_UP, DOWN = "gate_up", "down"
OUTPUT_BIAS = "down_bias"  # [E, D]; of the bank's other tensors, axis 1 runs over neurons
WITH_NEURONS = (GATE_UP, "gate_up_bias", DOWN)
BANK, ROUTER = "experts.", "router."  # what stands before the names of a layer's tensors
FIRST, SECOND, COUNT = "exp_avg", "exp_avg_sq", "step"  # AdamW's state of a parameter
LINEAR = (FIRST, "momentum_buffer")  # sums of gradients, of which Muon keeps one
VALUES = ""  # of the parameter itself


@dataclass(frozen=True)
class LayerSurgery:
    """A plan with what carrying it out needs of the layer that it is for."""

    layer_id: int
    plan: LayerPlan
    rows: ExpertRows
    num_experts: int  # E
    width: int  # F
    seed: int = 0

    def touches(self, name: str) -> bool:
        """Whether a tensor of the layer ("experts.down", "router.weight") is changed."""
        return name.startswith(BANK) or (name.startswith(ROUTER) and name.removeprefix(ROUTER) in self.rows.tensors)

    def shape(self, name: str, old: Shape) -> Shape:
        """Of the new tensor. Raises ConfigError for one of the bank's that no rule here is about."""
        experts = len(self.plan.experts)
        if name.startswith(ROUTER):
            return (experts + old[0] - self.num_experts, *old[1:])
        blocks = self._blocks(name, old)
        if not blocks:
            return (experts, *old[1:])
        return (experts, blocks * self.plan.moe_intermediate_size, *old[2:])

    def make(self, name: str, moment: str, stored: Stored) -> Tensor:
        """The new tensor, on the CPU in the old one's type: [E', ...]. `moment`: of the optimizer; empty: values."""
        old = stored.read()
        new = torch.empty(self.shape(name, tuple(old.shape)), dtype=old.dtype)
        if not old.dtype.is_floating_point and any(len(expert.sources) > 1 for expert in self.plan.experts):
            raise ConfigError(f"layer {self.layer_id}: {name} holds whole numbers, of which no mean can be taken")
        for index, expert in enumerate(self.plan.experts):
            new[index] = self._one(name, moment, old, expert, index)
        if name.startswith(ROUTER):
            new[len(self.plan.experts) :] = old[self.num_experts :]
        return new

    def _one(self, name: str, moment: str, old: Tensor, expert: NewExpert, index: int) -> Tensor:
        parts = list(self._parts(name, old, expert))
        factor = self._factor(name, moment, expert)
        if len(parts) == 1 and factor == 1:
            mixed = parts[0]
        elif moment == VALUES:
            shares = [share * factor for share in expert.shares]
            mixed = sum_of(parts, shares)
        else:
            mixed = sum_of(parts, [factor] * len(parts))
        noise = expert.row_noise if name.startswith(ROUTER) else expert.noise
        if moment != VALUES or noise == 0 or old.dim() < 2:  # a bias of the selection counts loads: none is added to it
            return mixed
        wide = mixed.double()
        stream = generator(self.seed, "surgery", self.layer_id, name, index)
        drawn = torch.empty(wide.shape, dtype=torch.float64).normal_(generator=stream)
        whole = old[: self.num_experts].double() if name.startswith(ROUTER) else wide
        return wide + noise * whole.std(correction=0) * drawn

    def _parts(self, name: str, old: Tensor, expert: NewExpert) -> Iterator[Tensor]:
        """Each source's slice, its neurons in place."""
        blocks = 0 if name.startswith(ROUTER) else self._blocks(name, tuple(old.shape))
        for place, source in enumerate(expert.sources):
            values = old[source]
            if blocks and expert.neurons is not None:
                neurons = torch.from_numpy(expert.neurons[place]).long()
                rows = torch.cat([neurons + block * self.width for block in range(blocks)])
                values = values.index_select(0, rows)
            yield values

    def _factor(self, name: str, moment: str, expert: NewExpert) -> float:
        """On the values: d of down. On a moment: r of a sum of gradients, r^2 of exp_avg_sq (`moelab.moe.surgery`)."""
        is_output = name in (BANK + DOWN, BANK + OUTPUT_BIAS)
        if moment == VALUES:
            # The biases of all that were made of one expert, each by its weight, add up to the one that it had.
            if name.startswith(ROUTER):
                return 1 / expert.copies if name.removeprefix(ROUTER) in self.rows.shared else 1.0
            bias = 1 / (expert.weight * expert.copies)
            return expert.down if name == BANK + DOWN else bias if name == BANK + OUTPUT_BIAS else 1.0
        if name.startswith(ROUTER):
            gradient = 1 / expert.copies
        else:
            gradient = expert.weight if is_output else expert.weight * expert.down
        return gradient if moment in LINEAR else gradient * gradient

    def _blocks(self, name: str, old: Shape) -> int:
        """Of F neurons along axis 1; 0 where no axis runs over neurons."""
        own = name.removeprefix(BANK)
        if own == OUTPUT_BIAS:
            return 0
        if own not in WITH_NEURONS or old[1] % self.width:
            raise ConfigError(
                f"layer {self.layer_id}: its experts hold '{own}', and surgery knows no rule for it, only for "
                f"{', '.join((*WITH_NEURONS, OUTPUT_BIAS))}"
            )
        return old[1] // self.width


def sum_of(parts: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Summed in float64, so that a mean of equals is the same to the last bit of float32."""
    total = factors[0] * parts[0].double()
    for part, factor in zip(parts[1:], factors[1:], strict=True):
        total += factor * part.double()
    return total
