"""Grouped-query attention: with biases on q, k and v as Qwen2 has it, or without, or with normed heads as Qwen3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moelab.config.model import ModelConfig
from moelab.nn.causal_attention import blocks_pay, causal_attention
from moelab.nn.kv_cache import Appending
from moelab.nn.linear import Linear
from moelab.nn.norm import RMSNorm
from moelab.nn.rope import rotate

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # as `attend`


@dataclass(frozen=True)
class AttentionInputs:
    """What every layer's attention shares in one forward pass."""

    cos: Tensor  # [B, 1, S, head_dim]
    sin: Tensor
    mask: Tensor | None  # [B, 1, S, S_all] bool, True where a query may look; None: plain causal
    cache: Appending | None = None
    attend: Attend | None = None  # computes in place of `Attention.attend`: for a look at the weights


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
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.use_qk_norm else None
        self.attend = attend

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        query, key, value = (self._heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query, inputs.cos.to(query.dtype), inputs.sin.to(query.dtype))
        key = rotate(key, inputs.cos.to(key.dtype), inputs.sin.to(key.dtype))
        if inputs.cache is not None:
            key, value = inputs.cache.append(self.layer_id, key, value)
        out = (inputs.attend or self.attend)(query, key, value, inputs.mask)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, H * head_dim] -> [B, H, S, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """query [B, H, S, d], key and value [B, G, S', d] -> [B, H, S, d], by what measures fastest."""
    if mask is None and blocks_pay(query):
        return causal_attention(query, key, value)
    return torch_attention(query, key, value, mask)


def torch_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` by torch's own kernel; mask as in `AttentionInputs`."""
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=query.shape[1] > key.shape[1]
    )


def attention_mask(padding: Tensor | None, seq: int, past: int, device: torch.device) -> Tensor | None:
    """Which keys each query may see: [B or 1, 1, S, past + S] bool, or None where plain causal attention does.

    padding [B, past + S] bool, False for padding. A padding query sees itself: a row without any key is NaN.
    """
    if padding is None and past == 0:
        return None
    rows = torch.arange(past, past + seq, device=device)[:, None]
    columns = torch.arange(past + seq, device=device)[None, :]
    mask = (columns <= rows)[None, None]
    if padding is not None:
        mask = (mask & padding[:, None, None, :]) | (columns == rows)[None, None]
    return mask
