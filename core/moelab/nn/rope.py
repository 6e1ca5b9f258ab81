"""Rotary position embedding (Su et al. 2021), halves rotated as Qwen2 does, tables in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


class Rope:
    """Angles for positions. Not a module: no buffer that `model.to(bfloat16)` could round (1.6e-3 in the logits)."""

    def __init__(self, head_dim: int, rope_theta: float) -> None:
        self.head_dim = head_dim
        self.rope_theta = rope_theta

    def tables(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position_ids [B, S] -> cos, sin [B, 1, S, head_dim] in `dtype`."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=position_ids.device).float()
        inv_freq = 1.0 / self.rope_theta ** (exponent / self.head_dim)  # [head_dim / 2]
        angles = position_ids[..., None].float() * inv_freq  # [B, S, head_dim / 2]
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, S, head_dim] -> the same, turned by its position's angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
