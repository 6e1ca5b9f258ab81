"""How widely a model attends: the entropy of attention's weights by layer and place, from blocks, never S x S at once.

B sequences, H query heads, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moelab.nn.transformer import TokenContext, Transformer


@dataclass
class AttentionEntropy:
    """Sums as `AttentionInputs.look` shows weights; an attention that doesn't show its own has no entry.

    Formula: -sum_j p_ij ln p_ij in nats, p_ij the weight of key j for query i: 0 where one key has all of it, ln n
    where n keys have the same. As Zhai et al. (2303.06296; the abstract was opened, not the paper) look at its fall in
    training; mean over heads and sequences.
    """

    length: int  # S
    sums: dict[int, Tensor] = field(default_factory=dict)  # layer -> [S] float64
    counts: dict[int, Tensor] = field(default_factory=dict)  # layer -> [S] int64: heads times sequences

    def __call__(self, layer_id: int, batch: slice, rows: slice, weights: Tensor) -> None:
        """weights [b, heads, rows, keys], as `Look` says."""
        if layer_id not in self.sums:
            self.sums[layer_id] = torch.zeros(self.length, dtype=torch.float64, device=weights.device)
            self.counts[layer_id] = torch.zeros(self.length, dtype=torch.int64, device=weights.device)
        found = torch.special.entr(weights).sum(-1, dtype=torch.float64)  # [b, heads, rows]
        self.sums[layer_id][rows] += found.sum((0, 1))
        self.counts[layer_id][rows] += found.shape[0] * found.shape[1]

    def mean(self) -> dict[int, Tensor]:
        """{layer: nats [S] float64, on the host}."""
        return {layer: (self.sums[layer] / self.counts[layer]).cpu() for layer in sorted(self.sums)}


@torch.no_grad()
def attention_entropy(
    model: Transformer, input_ids: Tensor, attention_mask: Tensor | None = None, tokens: TokenContext | None = None
) -> dict[int, Tensor]:
    """input_ids [B, S] int64 -> {layer: mean entropy of each query's weights, nats, [S] float64}.

    Layers whose attention shows no weights are left out. The model must be in evaluation mode already.
    """
    entropy = AttentionEntropy(input_ids.shape[1])
    state = model.embed(input_ids, attention_mask, tokens=tokens)
    model.run_layers(replace(state, inputs=replace(state.inputs, look=entropy)))
    return entropy.mean()
