"""The load-balancing loss of GShard and Switch, over a scope: micro-batch, sequence, whole batch, or devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from moelab.moe.coefficients import convert_coefficient
from moelab.moe.loss_terms import layer_mean, probabilities, scores_of, shares, sum_by_sequence, token_mean

SCOPES = ("micro", "sequence", "global", "device")


@dataclass
class LoadBalanceOptions:
    weight: float = 0.01  # Switch, ST-MoE, OLMoE; 8e-3 here is Hugging Face's 1e-3 at K = 8
    scope: str = "global"  # micro, sequence (DeepSeek-V3), global (whole batch, all ranks) or device (DeepSeek-V2)
    convention: str = "moelab"  # whose coefficient `weight` is: moelab, huggingface, megatron, megablocks, deepspeed
    num_devices: int = 1  # scope=device: groups of experts that lie together

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, not '{self.scope}'")
        if self.num_devices < 1:
            raise ValueError(f"num_devices must be at least 1, not {self.num_devices}")


class LoadBalance:
    """E * sum_i f_i P_i: the share of assignments times the mean probability, by expert.

    Formula: f_i = c_i / sum_j c_j over the scope (no gradient), P_i = mean over tokens of p_ti, p normalised over
    experts; E sum_i f_i P_i, meaned over layers. Balanced: 1; all on one expert: E / K. `sequence`: f and P by
    sequence, then meaned, each sequence by its length. `device`: D sum_d F_d P_d, F and P summed over each of D groups.
    Source: Switch (2101.03961) eq. 4, GShard (2006.16668); sequence: DeepSeek-V3 (2412.19437) eq. 17; global: Qwen
    (2501.11873); device: DeepSeek-V2 (2405.04434) eq. 26.
    Use: the standard. `global` leaves a sequence free to specialise, which trains better experts; it and `sequence`
    are the same for any split into micro-batches, `micro` is not.
    Cost: `global` and `device` need the whole batch's counts before the first backward pass.
    """

    def __init__(self, options: LoadBalanceOptions, context: BalanceLossContext) -> None:
        top_k = {layout.num_experts_per_tok for layout in context.layouts.values()}
        if options.convention == "huggingface" and len(top_k) > 1:
            raise ConfigError(f"convention: huggingface needs one num_experts_per_tok; the layers have {sorted(top_k)}")
        self.weight = convert_coefficient(
            options.weight, options.convention, "moelab", top_k=max(top_k, default=1), num_layers=len(context.layouts)
        )
        self.scope = options.scope
        self.num_devices = options.num_devices
        self.split_invariant = options.scope != "micro"
        self.needs_batch_counts = options.scope in ("global", "device")
        if options.scope == "device":
            for layer_id, layout in context.layouts.items():
                if layout.num_experts % options.num_devices:
                    raise ConfigError(
                        f"num_devices: {options.num_devices} does not divide num_experts {layout.num_experts} of layer "
                        f"{layer_id}"
                    )

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """-> scalar, meaned over layers and this micro-batch's tokens."""
        if self.scope == "sequence":
            return layer_mean(records, self._by_sequence)

        def term(record: LayerRecord) -> Tensor:
            counts = record.wanted
            if self.needs_batch_counts and context.batch_counts is not None:
                counts = context.batch_counts[record.layer_id].to(counts.device)
            load = shares(counts)
            mean = token_mean(probabilities(scores_of(record)), record.routing.token_mask)
            if self.scope == "device":
                load, mean = (v.view(self.num_devices, -1).sum(-1) for v in (load, mean))
            return load.numel() * (load * mean).sum()

        return layer_mean(records, term)

    def _by_sequence(self, record: LayerRecord) -> Tensor:
        routing = record.routing
        p = probabilities(scores_of(record))
        real = p.new_ones(p.shape[0]) if routing.token_mask is None else routing.token_mask.to(p.dtype)
        length = sum_by_sequence(real, record)  # [B]
        mean = sum_by_sequence(p * real.unsqueeze(-1), record) / length.clamp_min(1).unsqueeze(-1)  # [B, E]
        load = shares(sum_by_sequence(routing.choice_map().to(p.dtype), record))
        value = p.shape[-1] * (load * mean).sum(-1)  # [B]
        return (value * length).sum() / length.sum().clamp_min(1)


@hookimpl
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:
    return [component("load_balance", LoadBalanceOptions, LoadBalance)]
