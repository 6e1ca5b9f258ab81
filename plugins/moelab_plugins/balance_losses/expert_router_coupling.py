"""Each expert answers loudest to its own row of the router, and each row loudest in its own expert: ERC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import (
    BalanceContext,
    BalanceLoss,
    BalanceLossContext,
    Component,
    ConfigError,
    LayerRecord,
    component,
    hookimpl,
)
from moelab.moe.loss_terms import layer_mean
from moelab.seeds import derive_seed


@dataclass
class ExpertRouterCouplingOptions:
    weight: float = 1.0
    alpha: float = 1.0  # how much louder: another's activation is to stay below alpha times the own. 1: just louder
    noise: bool = True  # rows stand for their tokens: moved at random, less than half way to the nearest other row

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, not {self.alpha}")


class ExpertRouterCoupling:
    """Hinges on an E x E matrix of activations: what is not on the diagonal is to stay below it, by row and by column.

    Formula: M_ij = |W_gate_j r_i|, with r_i row i of the router times U(1 - e_i, 1 + e_i) by component, e_i =
    |R_i - R_n| / (2 |R_i|), n the row nearest to i; the loss is 1 / E^2 times the sum over i and j != i of
    max(M_ij - alpha M_ii, 0) + max(M_ji - alpha M_ii, 0), meaned over layers. Noise has no gradient, and e_i is at most
    one. One expert, or rows and experts that fit: 0.
    Source: ERC loss (2512.23447): both constraints in its abstract, noise and activation in a review of it; how they
    are summed, and the weight and alpha of 1, are as remembered (its equations could not be opened).
    Use: routers whose rows say little of what their experts do; alpha below 1 asks for more specialised experts. Not
    invariant to scale: larger gates make all of M larger.
    Cost: 2 E^2 F D multiply-adds a layer and micro-batch, whatever its tokens, and E^2 F numbers until the backward
    pass; over several processes every one of them gathers the layer's experts, and keeps them until then.
    """

    needs_batch_counts = False
    needs_expert_weights = True

    def __init__(self, options: ExpertRouterCouplingOptions, context: BalanceLossContext) -> None:
        self.weight = options.weight
        self.alpha, self.noise = options.alpha, options.noise
        self.split_invariant = not options.noise  # each micro-batch draws its own

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """-> scalar."""
        return layer_mean(records, self._layer)

    def _layer(self, record: LayerRecord) -> Tensor:
        if record.router_weight is None or record.gate_up is None or record.down is None:
            raise ConfigError(
                f"layer {record.layer_id}: this loss needs a router with a 'weight', and experts' weights"
            )
        experts, gate_up = record.routing.num_experts, record.gate_up
        if record.router_weight.shape[1] != gate_up.shape[-1]:
            raise ConfigError(
                f"layer {record.layer_id}: this loss sends the router's rows through its experts, which take "
                f"{gate_up.shape[-1]} numbers, and they have {record.router_weight.shape[1]}; it needs a linear gate, "
                "and experts that see what the router sees"
            )
        rows = record.router_weight[:experts].to(torch.promote_types(gate_up.dtype, torch.float32))
        gate = gate_up[:, : record.down.shape[1]].to(rows.dtype)  # [E, F, D]
        with torch.autocast(rows.device.type, enabled=False):
            if self.noise:
                rows = rows * self._noise(rows.detach(), record)
            answer = torch.einsum("id,jfd->ijf", rows, gate)
            # Not .norm(): its gradient at 0 is NaN.
            loud = (answer.square().sum(-1) + torch.finfo(rows.dtype).tiny).sqrt()  # [E, E]
        own = self.alpha * loud.diagonal()[:, None]
        over = (loud - own).relu() + (loud.t() - own).relu()
        return (over.sum() - over.diagonal().sum()) / experts**2

    def _noise(self, rows: Tensor, record: LayerRecord) -> Tensor:
        """rows [E, D] -> factors [E, D] around one."""
        if len(rows) < 2:
            return torch.ones_like(rows)
        apart = torch.cdist(rows, rows).fill_diagonal_(float("inf")).amin(1)
        reach = (apart / (2 * rows.norm(dim=1)).clamp_min(1e-12)).clamp_max(1.0)
        given = None if record.info is None else record.info.generator
        stream = None
        if given is not None:
            # The same for all layers: two that are equal cost what one does.
            stream = torch.Generator(rows.device).manual_seed(
                derive_seed(given.initial_seed(), "expert-router coupling")
            )
        drawn = torch.empty_like(rows).uniform_(-1, 1, generator=stream)
        return 1 + reach[:, None] * drawn


@hookimpl
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:
    return [component("expert_router_coupling", ExpertRouterCouplingOptions, ExpertRouterCoupling)]
