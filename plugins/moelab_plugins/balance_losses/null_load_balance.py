"""Load balance where some choices are no experts: null, zero, copy, constant."""

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
from moelab.moe.loss_terms import (
    batch_choices,
    batch_counts,
    layer_mean,
    probabilities,
    scores_of,
    shares,
    token_mean,
)

KINDS = ("weighted", "average", "device")
SCOPES = ("micro", "global")
CONVENTIONS = ("moelab", "moe_plus_plus")


@dataclass
class NullLoadBalanceOptions:
    weight: float = 0.01  # in units of `convention`; MoE++'s beta is 0.01 in its own
    convention: str = "moelab"  # moelab: E' sum n f P, f summing to 1; moe_plus_plus: sum n f P, f summing to K (eq. 7)
    kind: str = "weighted"  # weighted (MoE++), average (AdaMoE) or device (LongCat-Flash)
    tau: float = 0.75  # weighted: how much a choice that is no expert counts
    scope: str = "global"  # of f: global (whole batch, all ranks), or micro, as LongCat-Flash counts
    num_devices: int = 1  # device: D groups of experts that lie together
    target_experts: float | None = None  # device: K_e, real experts a token is to take; null: K E / E'

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not '{self.kind}'")
        if self.convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, not '{self.convention}'")
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, not '{self.scope}'")
        if self.tau < 0:
            raise ValueError(f"tau must not be negative, not {self.tau}")
        if self.num_devices < 1:
            raise ValueError(f"num_devices must be at least 1, not {self.num_devices}")
        if self.kind != "device" and (self.num_devices != 1 or self.target_experts is not None):
            raise ValueError(f"num_devices and target_experts are of kind device, not '{self.kind}'")
        if self.kind == "device" and self.convention != "moelab":
            raise ValueError(f"convention: {self.convention} says nothing of kind device, whose f has no other")


class NullLoadBalance:
    """load_balance over all choices, where those that are no experts weigh tau, share one mean load, or are one group.

    Formula: E' sum_i n_i f_i P_i over all E' choices, f and P as in load_balance. weighted: n_i = 1 for an expert, tau
    otherwise. average: n_i = 1, and every null choice has the nulls' mean f, so that which null was taken does not
    matter. Balanced, with E experts: (E + tau (E' - E)) / E', or 1. MoE++'s own value has no E' in front and an f that
    sums to K, so it is K / E' of that: 6 times less for 8 + 4 experts and K = 2. device: sum_j f_j P_j over D groups of
    experts and one of all null choices, P_j the sum of its P_i; of the choices that fall to it in T tokens, f_j is
    D / (K_e T) for experts and 1 / ((K - K_e) T) for the nulls. 1 where each token takes K_e experts, evenly.
    Source: weighted: MoE++ (2410.07348) eq. 7, which is silent on layers (here their mean); average: AdaMoE
    (2406.13233) 3.3 (section not opened; its code's exp_1). device: LongCat-Flash (2509.01322) 2.1.2, eq. 3-5, which
    counts over a micro-batch (scope micro) and gives no alpha, but advises one whose gradient stays below a tenth of
    the text's (3.1.3). Its "token t selects Group_j" is read as every choice of t in the group: only so do the
    coefficients lead to K_e : K - K_e, as it says. Counted is who was chosen, bias included.
    Use: with moe_plus_plus and null_experts. The smaller tau, the more tokens take choices that cost nothing. device:
    beside the bias of null_experts that leads to K_e over the corpus, against extremes within a batch.
    Cost: as load_balance.
    """

    def __init__(self, options: NullLoadBalanceOptions, context: BalanceLossContext) -> None:
        self.weight = options.weight
        self.options = options
        self.needs_batch_counts = self.split_invariant = options.scope == "global"
        self.top_k = {layer: layout.num_experts_per_tok for layer, layout in context.layouts.items()}
        for layer_id, layout in context.layouts.items():
            if layout.num_experts % options.num_devices:
                raise ConfigError(
                    f"num_devices: {options.num_devices} does not divide num_experts {layout.num_experts} of layer "
                    f"{layer_id}"
                )
            if options.target_experts is not None and not 0 < options.target_experts < layout.num_experts_per_tok:
                raise ConfigError(
                    f"target_experts: {options.target_experts:g} must be above 0 and below num_experts_per_tok "
                    f"{layout.num_experts_per_tok} of layer {layer_id}"
                )

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """-> scalar."""
        told = context if self.needs_batch_counts else BalanceContext(None)
        by_kind = self._by_device if self.options.kind == "device" else self._by_choice

        def term(record: LayerRecord) -> Tensor:
            return by_kind(record, told, token_mean(probabilities(scores_of(record)), record.routing.token_mask))

        return layer_mean(records, term)

    def _by_choice(self, record: LayerRecord, context: BalanceContext, mean: Tensor) -> Tensor:
        """mean [E'], the mean probabilities -> scalar."""
        load = shares(batch_counts(record, context)).to(mean.dtype)
        experts = record.routing.num_experts
        if self.options.kind == "average" and load.numel() > experts:
            nulls = load[experts:].mean().expand(load.numel() - experts)
            load = torch.cat([load[:experts], nulls])
        factor = torch.ones_like(mean)
        if self.options.kind == "weighted":
            factor[experts:] = self.options.tau
        scale = load.numel() if self.options.convention == "moelab" else self.top_k[record.layer_id]
        return scale * (factor * load * mean).sum()

    def _by_device(self, record: LayerRecord, context: BalanceContext, mean: Tensor) -> Tensor:
        """mean [E'], the mean probabilities -> scalar."""
        load = shares(batch_choices(record, context)).to(mean.dtype)  # of K T choices
        experts, top_k, devices = record.routing.num_experts, self.top_k[record.layer_id], self.options.num_devices
        if load.numel() == experts:
            raise ConfigError(
                f"layer {record.layer_id}: kind device needs choices that are no experts, and this router has none; "
                "take load_balance with scope: device"
            )
        target = self.options.target_experts
        real = experts / load.numel() if target is None else target / top_k  # K_e / K
        grouped = [torch.cat([v[:experts].view(devices, -1).sum(-1), v[experts:].sum(-1, True)]) for v in (load, mean)]
        load, mean = grouped
        return devices / real * (load[:-1] * mean[:-1]).sum() + load[-1] * mean[-1] / (1 - real)


@hookimpl
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:
    return [component("null_load_balance", NullLoadBalanceOptions, NullLoadBalance)]
