"""Rotary position embedding (Su et al. 2021), halves rotated as Qwen2 does, tables in fp32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Rope:
    """Angles for positions. Not a module: no buffer that `model.to(bfloat16)` could round (1.6e-3 in the logits)."""

    def __init__(self, head_dim: int, rope_theta: float, scaling: Mapping[str, Any] | None = None) -> None:
        """`scaling`: as config/rope_scaling.py checks it."""
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.scaling = scaling

    def tables(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position_ids [B, S] -> cos, sin [B, 1, S, head_dim] in `dtype`."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=position_ids.device).float()
        inv_freq = 1.0 / self.rope_theta ** (exponent / self.head_dim)  # [head_dim / 2]
        if self.scaling is not None:
            inv_freq = SCALINGS[self.scaling["rope_type"]](inv_freq, self.scaling)
        angles = position_ids[..., None].float() * inv_freq  # [B, S, head_dim / 2]
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def llama3(inv_freq: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """inv_freq [head_dim / 2] -> the same, slow ones divided by `factor`, fast ones kept, those between blended.

    A frequency turns w = original_max_position_embeddings * inv_freq / 2 pi times over the original length: kept from
    high_freq_factor turns on, divided up to low_freq_factor, linear in w between (transformers 5.23,
    modeling_rope_utils.py: _compute_llama3_parameters).
    """
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / inv_freq)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * inv_freq / scaling["factor"] + kept * inv_freq


SCALINGS = {"llama3": llama3}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, S, head_dim] -> the same, turned by its position's angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
