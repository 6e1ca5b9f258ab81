"""How far a model reaches: positions up to which its attention and its rotary embedding mean what they were trained to.

Beyond them it is told once, with the cure: a model that is asked for more computes on, and worse and worse.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from moelab.nn.rope import RopeScaling

logger = logging.getLogger("moelab")


class Attending(Protocol):
    """The attention of a layer: `AttentionKernel` says what these are."""

    @property
    def cache_mode(self) -> str: ...

    @property
    def reach(self) -> float | None: ...


class Positional:
    """What of a model says where tokens stand: the attention of its layers, and the scaling of their embedding."""

    def __init__(self, attentions: Sequence[Attending], scaling: RopeScaling | None, trained: int) -> None:
        """`trained`: max_position_embeddings."""
        self.attentions, self.scaling, self.trained = attentions, scaling, trained
        self._told = False

    def check(self, length: int) -> None:
        """Warn once for a forward pass of more positions than the model reaches, cached ones included."""
        if self._told or length <= self.trained or length <= self.reach:
            return
        self._told = True
        logger.warning(
            "%d tokens: the model reaches %d (model.max_position_embeddings, and what extends it); beyond, expect the "
            "loss to rise. To extend it without training: model.rope_scaling (yarn) or model.attention (dual_chunk); "
            "`moelab evaluate` and `moelab generate` take --rope-scaling and --attention",
            length, self.reach,
        )  # fmt: skip

    @property
    def reach(self) -> float:
        """Positions; infinite for attention that takes any number. As far as its shortest layer reaches."""
        rope = float(self.trained)
        if self.scaling is not None and self.scaling.reach is not None:
            rope = max(rope, self.scaling.reach)
        own = [attention.reach for attention in self.attentions]
        return min((rope if reach is None else max(rope, reach) for reach in own), default=rope)

    def cache_mode(self, scaling: Any) -> str:
        """What a cache of this model's keys holds. `scaling`: the config's, by which they were turned."""
        modes = " and ".join(sorted({attention.cache_mode for attention in self.attentions}))
        return modes if scaling is None else f"{modes}, rope scaling {scaling}"
