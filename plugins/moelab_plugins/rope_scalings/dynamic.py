"""Dynamic NTK: the base grows with the text, so that short texts are left as they are."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from omegaconf import MISSING

from moelab import Component, component, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from moelab.config.rope_scaling import RopeContext
    from moelab.nn.rope import RopeScaling


@dataclass
class DynamicOptions:
    factor: float = MISSING  # growth of the base by length: 1 keeps the longest wavelength at the text's length
    original_max_position_embeddings: int | None = None  # the trained length; null: the model's longest sequence

    def __post_init__(self) -> None:
        if not 1 <= self.factor < inf:
            raise ValueError(f"factor must be at least 1, not {self.factor}")
        if self.original_max_position_embeddings is not None and self.original_max_position_embeddings < 1:
            raise ValueError(
                f"original_max_position_embeddings must be at least 1, not {self.original_max_position_embeddings}"
            )


class Dynamic:
    """Dynamic NTK: the base of the wavelengths grows with the text once it is longer than the trained length.

    Formula: b' = b (f L / L0 - (f - 1))^(d / (d - 2)), for L > L0 positions; L0 is the trained length.
    Source: transformers 5.23, modeling_rope_utils.py: _compute_dynamic_ntk_parameters, which credits bloc97 and
    emozilla; YaRN (2309.00071) 3.3 describes it, and would have caches hold keys before they are turned.
    Use: longer texts without training. What a token means depends on how long the text is, so with a cache the keys of
    earlier steps keep the base they were turned with, as in transformers: continuing is not the same as reading again.
    Cost: none at run time.
    """

    length_matters = True
    reach = inf

    def __init__(self, options: DynamicOptions, context: RopeContext) -> None:
        self.factor, self.base, self.head_dim = options.factor, context.rope_theta, context.head_dim
        self.original = options.original_max_position_embeddings or context.max_position_embeddings
        if self.head_dim < 4:
            raise ValueError(f"head_dim: dynamic scaling needs at least 4, not {self.head_dim}")

    def __call__(self, inv_freq: Tensor, length: int) -> tuple[Tensor, float]:
        if length <= self.original:
            return inv_freq, 1.0
        import torch

        size = self.head_dim
        base = self.base * (self.factor * length / self.original - (self.factor - 1)) ** (size / (size - 2))
        exponent = torch.arange(0, size, 2, dtype=torch.int64, device=inv_freq.device).float()
        return 1.0 / base ** (exponent / size), 1.0


@hookimpl
def moelab_rope_scalings() -> list[Component[RopeContext, RopeScaling | None]]:
    return [component("dynamic", DynamicOptions, Dynamic)]
