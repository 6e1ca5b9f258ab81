"""YaRN: slow frequencies interpolated, fast ones kept, and attention sharpened."""

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
class YarnOptions:
    factor: float = MISSING  # how many times the trained length
    original_max_position_embeddings: int | None = None  # the trained length; null: the model's longest sequence
    beta_fast: float = 32.0  # turns over the trained length from which a frequency is kept
    beta_slow: float = 1.0  # turns up to which it is divided by the factor
    attention_factor: float | None = None  # on cos and sin; null: 0.1 ln(factor) + 1
    mscale: float | None = None  # with mscale_all_dim, DeepSeek's: the factor is the quotient of both
    mscale_all_dim: float | None = None  # in latent attention it sharpens the scores of whole heads too
    truncate: bool = True  # whether the borders between fast and slow are rounded to whole frequencies

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor must be at least 1, not {self.factor}")
        if not 0 < self.beta_slow <= self.beta_fast < math.inf:
            raise ValueError(
                f"beta_slow must be positive and at most beta_fast, not {self.beta_slow}, {self.beta_fast}"
            )
        for key in ("original_max_position_embeddings", "attention_factor"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{key} must be positive, not {value}")
        for key in ("mscale", "mscale_all_dim"):  # transformers takes 0 for unsaid
            value = getattr(self, key)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{key} must not be negative, not {value}")


class Yarn:
    """Frequencies that turn often are kept, those that don't once over the trained length are divided by the factor.

    Formula: theta_k' = (1 - g_k) theta_k + g_k theta_k / f, g_k rising from 0 to 1 between the k that turn beta_fast
    and beta_slow times over L0: k(r) = d ln(L0 / 2 pi r) / 2 ln b. Cos and sin times m = 0.1 ln f + 1, so that scores
    are m^2 as large.
    Attention that turns a part of each head (latent_attention) multiplies all scores by
    (0.1 mscale_all_dim ln f + 1)^2, as DeepSeek's does.
    Source: YaRN (2309.00071) 3.2 (definition 2) and 3.4; transformers 5.23, modeling_rope_utils.py:
    _compute_yarn_parameters. As there g is linear in k; the paper's ramp is linear in the turns L0 theta_k / 2 pi.
    Use: Qwen2's way beyond 32k tokens, at inference or before a short training at the longer length.
    Cost: none at run time. Static, as in transformers: short texts change too.
    """

    length_matters = False

    def __init__(self, options: YarnOptions, context: RopeContext) -> None:
        self.options, self.context = options, context
        self.original = options.original_max_position_embeddings or context.max_position_embeddings
        self.reach = options.factor * self.original
        self.score_factor = _sharper(options.factor, options.mscale_all_dim or 0.0) ** 2

    def __call__(self, inv_freq: Tensor, length: int) -> tuple[Tensor, float]:
        import torch

        low, high = self._border(self.options.beta_fast), self._border(self.options.beta_slow)
        if self.options.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.context.head_dim - 1)
        index = torch.arange(len(inv_freq), dtype=torch.float32, device=inv_freq.device)
        slow = ((index - low) / ((high - low) or 0.001)).clamp(0, 1)
        return inv_freq / self.options.factor * slow + inv_freq * (1 - slow), self._attention_factor()

    def _border(self, turns: float) -> float:
        """The k of the frequency that turns so often over the trained length."""
        size, base = self.context.head_dim, self.context.rope_theta
        return size * (math.log(self.original / (2 * math.pi)) - math.log(turns)) / (2 * math.log(base))

    def _attention_factor(self) -> float:
        said = self.options
        if said.attention_factor is not None:
            return said.attention_factor
        if said.mscale and said.mscale_all_dim:
            return _sharper(said.factor, said.mscale) / _sharper(said.factor, said.mscale_all_dim)
        return _sharper(said.factor, 1.0)


def _sharper(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


@hookimpl
def moelab_rope_scalings() -> list[Component[RopeContext, RopeScaling | None]]:
    return [component("yarn", YarnOptions, Yarn)]
