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
from moelab.moe.coefficients import convert_coefficient, find_convention
from moelab.moe.loss_terms import (
    batch_choices,
    batch_counts,
    layer_mean,
    probabilities,
    scores_of,
    shares,
    sum_by_sequence,
    token_mean,
)

SCOPES = ("micro", "sequence", "global", "device")
COUNTED = ("scores", "choices")


@dataclass
class LoadBalanceOptions:
    weight: float = 0.01  # OLMoE, T5X at K = 1; mesh adds over layers, so Switch's and ST-MoE's 0.01 is 0.01 L here
    scope: str = "global"  # micro, sequence (DeepSeek-V3), global (whole batch, all ranks) or device (DeepSeek-V2)
    count: str | None = None  # scores: the K best of a token; choices: bias and groups included; null: as the source
    convention: str = "moelab"  # whose coefficient `weight` is: see moelab.moe.coefficients, or docs/plugins.md
    num_devices: int = 1  # scope=device: groups of experts that lie together

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, not '{self.scope}'")
        if self.count is not None and self.count not in COUNTED:
            raise ValueError(f"count must be one of {', '.join(COUNTED)} or null, not '{self.count}'")
        if self.num_devices < 1:
            raise ValueError(f"num_devices must be at least 1, not {self.num_devices}")


class LoadBalance:
    """E * sum_i f_i P_i: the share of assignments times the mean probability, by expert.

    Formula: f_i = c_i / sum_j c_j over the scope (no gradient), P_i = mean over tokens of p_ti, p normalised over
    experts; E sum_i f_i P_i, meaned over layers. Balanced: 1; all on one expert: E / K. `sequence`: f and P by
    sequence, then meaned, each sequence by its length. `device`: D sum_d F_d P_d, F and P summed over each of D groups.
    c_i counts token t where s_ti is among its K largest scores: a bias or limits to groups move the choice and not the
    count. With `count: choices`, the default of `device`, it is the choice.
    Source: Switch (2101.03961) eq. 4, GShard (2006.16668); sequence: DeepSeek-V3 (2412.19437) eq. 17-20, whose count
    Megatron-Core takes for all its balance losses; global: Qwen (2501.11873); device: DeepSeek-V2 (2405.04434) eq. 26
    (not opened).
    Use: the standard. `global` leaves a sequence free to specialise, which trains better experts; it and `sequence`
    are the same for any split into micro-batches, `micro` is not.
    Cost: `global` and `device` need the whole batch's counts before the first backward pass. A biased or grouped router
    costs a second top-K over [T, E].
    """

    def __init__(self, options: LoadBalanceOptions, context: BalanceLossContext) -> None:
        self.top_k = {layout.num_experts_per_tok for layout in context.layouts.values()}
        self.num_layers = len(context.layouts)
        if len(self.top_k) > 1 and find_convention(options.convention).times_top_k:
            raise ConfigError(
                f"convention: {options.convention} needs one num_experts_per_tok; the layers have {sorted(self.top_k)}"
            )
        self.weight = self._convert(options.weight, options.convention, "moelab")
        self.scope = options.scope
        self.count = options.count or ("choices" if options.scope == "device" else "scores")
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
            told = context if self.needs_batch_counts else BalanceContext(None)
            load = shares((batch_choices if self.count == "choices" else batch_counts)(record, told))
            mean = token_mean(probabilities(scores_of(record)), record.routing.token_mask)
            if self.scope == "device":
                if load.numel() != record.routing.num_experts:
                    raise ConfigError(
                        f"layer {record.layer_id}: scope device sums over groups of experts, and this router has "
                        f"{load.numel() - record.routing.num_experts} choices that are none; take another scope"
                    )
                load, mean = (v.view(self.num_devices, -1).sum(-1) for v in (load, mean))
            return load.numel() * (load * mean).sum()

        return layer_mean(records, term)

    def _by_sequence(self, record: LayerRecord) -> Tensor:
        routing = record.routing
        p = probabilities(scores_of(record))
        real = p.new_ones(p.shape[0]) if routing.token_mask is None else routing.token_mask.to(p.dtype)
        length = sum_by_sequence(real, record)  # [B]
        mean = sum_by_sequence(p * real.unsqueeze(-1), record) / length.clamp_min(1).unsqueeze(-1)  # [B, E]
        counted = routing.choice_map() if self.count == "choices" else routing.balance_map
        load = shares(sum_by_sequence(counted.to(p.dtype), record))
        value = p.shape[-1] * (load * mean).sum(-1)  # [B]
        return (value * length).sum() / length.sum().clamp_min(1)

    def qwen2_moe_fields(self) -> dict[str, float] | str:
        if self.scope not in ("micro", "global"):
            return f"transformers counts over a whole batch, and its scope is {self.scope}"
        if len(self.top_k) > 1:
            return f"transformers has one num_experts_per_tok, and its layers have {sorted(self.top_k)}"
        return {"router_aux_loss_coef": self._convert(self.weight, "moelab", "huggingface")}

    def _convert(self, value: float, source: str, target: str) -> float:
        return convert_coefficient(
            value, source, target, top_k=max(self.top_k, default=1), num_layers=max(self.num_layers, 1)
        )


@hookimpl
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:
    return [component("load_balance", LoadBalanceOptions, LoadBalance)]
