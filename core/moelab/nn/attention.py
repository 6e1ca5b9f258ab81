"""Grouped-query attention: with biases on q, k and v (Qwen2) or none, with normed heads (Qwen3), with sinks (gpt-oss).

The projections are here; what happens between them is an attention plugin's (`attention_inputs.AttentionKernel`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moelab.config.model import ModelConfig
from moelab.nn.attention_inputs import AttentionContext, AttentionInputs, AttentionKernel
from moelab.nn.full_attention import FullAttention
from moelab.nn.linear import Linear
from moelab.nn.norm import RMSNorm
from moelab.nn.positional_promises import attended, kernel_part
from moelab.nn.rope import RopeScaling
from moelab.plugin_faults import PluginPart


class Attention(nn.Module):
    """x [B, S, D] -> [B, S, D]."""

    def __init__(self, config: ModelConfig, layer_id: int) -> None:
        super().__init__()
        hidden_size, head_dim, bias = config.hidden_size, config.attention_head_dim, config.qkv_bias
        num_heads, num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = head_dim
        self.layer_id = layer_id
        self.q_proj = Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.use_qk_norm else None
        self.sinks = nn.Parameter(torch.empty(num_heads)) if config.attention_sinks else None
        self.kernel: AttentionKernel = FullAttention(layer_id)  # what computes the heads

    def take(self, kernel: AttentionKernel, scaling: RopeScaling | None) -> None:
        """Compute the heads by `kernel` from now on; what stretches the rotary embedding is in its tables."""
        self.kernel = kernel

    def plugin_parts(self) -> list[tuple[PluginPart, object]]:
        """Who to blame for what the heads' computation raises."""
        return [(kernel_part(self.kernel, self.layer_id), self.kernel)]

    @property
    def cache_mode(self) -> str:
        """What a cache of it holds."""
        return self.kernel.cache_mode

    @property
    def reach(self) -> float | None:
        """As `AttentionKernel`'s."""
        return self.kernel.reach

    @property
    def key_products(self) -> int:
        """Multiplications with one key and value: 2 H head_dim."""
        return 2 * self.o_proj.in_features

    @property
    def cached_numbers(self) -> int:
        """What a cache keeps of a token: 2 G head_dim."""
        return self.k_proj.out_features + self.v_proj.out_features

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        query, key, value = (self._heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:  # in the order of memory, which their passes follow
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        if self.sinks is not None:
            inputs = replace(inputs, sinks=self.sinks)
        out = self.kernel(query, key, value, inputs)
        if (fault := attended(out, query, value.shape[-1])) is not None:
            raise kernel_part(self.kernel, self.layer_id).fault(fault, self.kernel)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, H * head_dim] -> [B, S, H, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim))


def attention_context(config: ModelConfig, layer_id: int) -> AttentionContext:
    """What the attention of a layer is built from."""
    return AttentionContext(
        head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        layer_id=layer_id,
        num_hidden_layers=config.num_hidden_layers,
        max_position_embeddings=config.max_position_embeddings,
    )
