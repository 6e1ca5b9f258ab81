"""Keeps the rows of the router apart."""

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

KINDS = ("ernie", "simbal")


@dataclass
class RouterOrthogonalityOptions:
    weight: float = 1e-3
    kind: str = "ernie"  # ernie: unit rows, mean square; simbal: rows as they are, sum of absolute values

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not '{self.kind}'")


class RouterOrthogonality:
    """Distance of the router's Gram matrix from the identity.

    Formula: ernie: mean over the E x E entries of (U U^T - I)^2, U the rows of W scaled to length one; simbal:
    sum of |W W^T - I|. Both 0 for orthonormal rows, which needs E <= D. Meaned over layers.
    Source: ERNIE 4.5 technical report; SimBal (2506.14038); neither could be opened to check the formula. ERNIE applies
    it after the optimizer step with its own rate, here it is a term of the loss.
    Use: routers that collapse onto few directions. Pulls against weight decay in the kind simbal.
    Cost: E^2 D, once for each micro-batch.
    """

    needs_batch_counts = False

    def __init__(self, options: RouterOrthogonalityOptions, context: BalanceLossContext) -> None:
        self.weight = options.weight
        self.kind = options.kind

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """-> scalar."""
        return layer_mean(records, self._layer)

    def _layer(self, record: LayerRecord) -> Tensor:
        if record.router_weight is None:
            raise ConfigError(f"layer {record.layer_id}: this loss needs a router with a 'weight', and it has none")
        weight = record.router_weight.to(torch.promote_types(record.router_weight.dtype, torch.float32))
        with torch.autocast(weight.device.type, enabled=False):
            if self.kind == "ernie":
                weight = torch.nn.functional.normalize(weight, dim=-1)
            off = weight @ weight.t() - torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        return off.square().mean() if self.kind == "ernie" else off.abs().sum()


@hookimpl
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:
    return [component("router_orthogonality", RouterOrthogonalityOptions, RouterOrthogonality)]
