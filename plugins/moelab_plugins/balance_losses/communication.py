"""How evenly tokens are sent to devices, each counted once however many of its experts it takes there."""

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
    device_tokens,
    layer_mean,
    probabilities,
    scores_of,
    sum_by_sequence,
    token_mean,
)

SCOPES = ("sequence", "global")


@dataclass
class CommunicationOptions:
    weight: float = 0.02  # DeepSeek-V2's alpha_3
    num_devices: int = 8  # D groups of experts that lie together; 8 in DeepSeek-V2
    devices_per_token: int = 3  # M, the topk_group of the router; 3 in DeepSeek-V2
    scope: str = "sequence"  # sequence, as the source counts, or global: the whole batch, all ranks

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, not '{self.scope}'")
        if not 1 <= self.devices_per_token <= self.num_devices:
            raise ValueError(
                f"devices_per_token must be in 1 .. num_devices {self.num_devices}, not {self.devices_per_token}"
            )


class Communication:
    """sum_d f_d P_d: the share of tokens that a device receives times the probability of its experts.

    Formula: f_d = D / (M T) * the tokens with an expert on device d (no gradient), P_d = the mean over tokens of the
    sum of p_ti over its experts, p normalised; by sequence, each by its length, or over the whole batch; meaned over
    layers. Choices that are no experts lie on no device. Where every device receives M T / D: 1. What is counted is who
    was chosen, bias and groups included.
    Source: DeepSeek-V2 (2405.04434) 2.2.3, communication balance loss, read in notes on the paper; weight, D and M as
    remembered of its 3.1.2. DeepSeek-V3 keeps the limit to nodes and has no such loss.
    Use: expert parallelism with n_group = num_devices and topk_group = devices_per_token: the limit bounds what a token
    sends, this evens out what devices receive. Beside load_balance of scope device, which evens out what they compute.
    Cost: a [T, E] map of choices, and with scope global an all-reduce of D counts a layer.
    """

    def __init__(self, options: CommunicationOptions, context: BalanceLossContext) -> None:
        self.weight = options.weight
        self.options = options
        self.needs_batch_counts = options.scope == "global"
        for layer_id, layout in context.layouts.items():
            if layout.num_experts % options.num_devices:
                raise ConfigError(
                    f"num_devices: {options.num_devices} does not divide num_experts {layout.num_experts} of layer "
                    f"{layer_id}"
                )

    def batch_count(self, record: LayerRecord) -> Tensor:
        """[D + 1] int64: tokens that each device receives, and last how many there are; padding excluded."""
        sent = device_tokens(record, self.options.num_devices).sum(0)
        real = record.routing.token_mask
        tokens = sent.new_full((1,), record.routing.num_tokens) if real is None else real.sum().view(1)
        return torch.cat([sent, tokens])

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """-> scalar, meaned over layers and this micro-batch's tokens."""
        if self.options.scope == "sequence":
            return layer_mean(records, self._by_sequence)

        def term(record: LayerRecord) -> Tensor:
            own = context.batch_own
            counted = self.batch_count(record) if own is None else own[record.layer_id].to(record.counts.device)
            mean = self._by_device(token_mean(_of_experts(record), record.routing.token_mask))
            return (self._share(counted[:-1].to(mean.dtype), counted[-1].to(mean.dtype)) * mean).sum()

        return layer_mean(records, term)

    def _by_sequence(self, record: LayerRecord) -> Tensor:
        p = _of_experts(record)
        mask = record.routing.token_mask
        real = p.new_ones(p.shape[0]) if mask is None else mask.to(p.dtype)
        length = sum_by_sequence(real, record)  # [B]
        mean = self._by_device(sum_by_sequence(p * real.unsqueeze(-1), record)) / length.clamp_min(1).unsqueeze(-1)
        sent = sum_by_sequence(device_tokens(record, self.options.num_devices).to(p.dtype), record)  # [B, D]
        value = (self._share(sent, length.unsqueeze(-1)) * mean).sum(-1)  # [B]
        return (value * length).sum() / length.sum().clamp_min(1)

    def _share(self, sent: Tensor, tokens: Tensor) -> Tensor:
        options = self.options
        return sent * (options.num_devices / options.devices_per_token) / tokens.clamp_min(1)

    def _by_device(self, values: Tensor) -> Tensor:
        """[..., E] -> [..., D]."""
        return values.unflatten(-1, (self.options.num_devices, -1)).sum(-1)


def _of_experts(record: LayerRecord) -> Tensor:
    """[T, E]: the probabilities without those of choices that are no experts, which lie on no device."""
    return probabilities(scores_of(record))[:, : record.routing.num_experts]


@hookimpl
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:
    return [component("communication", CommunicationOptions, Communication)]
