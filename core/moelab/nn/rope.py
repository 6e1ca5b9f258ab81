"""Rotary position embedding (Su et al. 2021), halves rotated as Qwen2 does, tables in fp32."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class RopeScaling(Protocol):
    """(inv_freq [head_dim / 2] fp32, length) -> (inv_freq' of the same shape and dtype, factor on cos and sin).

    - `length_matters`: whether they change with `length`, the positions of the forward pass, cached ones included: then
      what a text means depends on what follows it.
    - `reach`: positions that it is meant for; None: those of the model's own length.
    - `score_factor`, where it has one: on all scores of attention of whose heads only a part is turned.
    """

    @property
    def length_matters(self) -> bool: ...

    @property
    def reach(self) -> float | None: ...

    def __call__(self, inv_freq: Tensor, length: int) -> tuple[Tensor, float]: ...


class Rope:
    """Angles for positions. Not a module: no buffer that `model.to(bfloat16)` could round (1.6e-3 in the logits)."""

    def __init__(self, head_dim: int, rope_theta: float, scaling: RopeScaling | None = None) -> None:
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.scaling = scaling

    def tables(self, position_ids: Tensor, dtype: torch.dtype, length: int = 0) -> tuple[Tensor, Tensor]:
        """position_ids [B, S] -> cos, sin [B, 1, S, head_dim] in `dtype`, in a forward pass of `length` positions."""
        inv_freq, factor = self.frequencies(position_ids.device, length)
        angles = position_ids[..., None].float() * inv_freq  # [B, S, head_dim / 2]
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()
        if factor != 1.0:
            cos, sin = cos * factor, sin * factor
        return cos.to(dtype), sin.to(dtype)

    def frequencies(self, device: torch.device, length: int = 0) -> tuple[Tensor, float]:
        """Radians a position, [head_dim / 2] fp32, and the factor on cos and sin."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=device).float()
        inv_freq = 1.0 / self.rope_theta ** (exponent / self.head_dim)
        return (inv_freq, 1.0) if self.scaling is None else self.scaling(inv_freq, length)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, S, head_dim] -> the same, turned by its position's angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
