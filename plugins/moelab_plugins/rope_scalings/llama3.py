"""Llama 3.1's stretched wavelengths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import MISSING

from moelab import Component, component, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from moelab.config.rope_scaling import RopeContext
    from moelab.nn.rope import RopeScaling


@dataclass
class Llama3Options:
    factor: float = MISSING  # of the slow frequencies
    low_freq_factor: float = MISSING  # turns over the original length up to which a frequency is slow
    high_freq_factor: float = MISSING  # turns from which it is fast, and kept
    original_max_position_embeddings: int = MISSING  # the trained length

    def __post_init__(self) -> None:
        for key in ("low_freq_factor", "original_max_position_embeddings"):
            value = getattr(self, key)
            if not 0 < value < math.inf:
                raise ValueError(f"{key} must be a positive number, not {value}")
        if not 1 <= self.factor < math.inf or not self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError("factor must be at least 1, and low_freq_factor less than high_freq_factor")


class Llama3:
    """Slow frequencies divided by a factor, fast ones kept, those between blended.

    Formula: a frequency turns w = L0 theta / 2 pi times over the original length; kept from high_freq_factor turns on,
    divided by f up to low_freq_factor, linear in w between.
    Source: Llama 3.1's model card (not opened); transformers 5.23, modeling_rope_utils.py: _compute_llama3_parameters.
    Use: Llama 3.1 to 3.3 and what is upcycled from them.
    Cost: none.
    """

    length_matters = False
    reach = None  # such models say their longer length themselves

    def __init__(self, options: Llama3Options, context: RopeContext) -> None:
        self.options = options

    def __call__(self, inv_freq: Tensor, length: int) -> tuple[Tensor, float]:
        said = self.options
        turns = said.original_max_position_embeddings / (2 * math.pi / inv_freq)
        kept = ((turns - said.low_freq_factor) / (said.high_freq_factor - said.low_freq_factor)).clamp(0.0, 1.0)
        return (1 - kept) * inv_freq / said.factor + kept * inv_freq, 1.0


@hookimpl
def moelab_rope_scalings() -> list[Component[RopeContext, RopeScaling | None]]:
    return [component("llama3", Llama3Options, Llama3)]
