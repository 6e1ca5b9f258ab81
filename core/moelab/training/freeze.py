"""Parameters that a run leaves as they are: `train.freeze`, patterns over their names."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from moelab.nn.names import stop_training

logger = logging.getLogger("moelab")
KEY = "train.freeze"


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters whose name matches a pattern (`*.router.*`, `layers.0.*`); returns their names.

    A frozen parameter gets no gradient, no decay and no optimizer state; the gradient still passes through it. A tied
    matrix has both its names. Buffers (a router's bias) are no parameters: what updates them goes on.
    FLOPs are counted as if everything were trained. Raises ConfigError for a pattern that matches nothing, and where
    nothing would be left to train.
    """
    if not patterns:
        return []
    frozen = stop_training(model, patterns, KEY)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    count = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    logger.warning(
        "%s: %s parameters in %d tensors stay as they are, %s are trained",
        KEY,
        f"{count:,}",
        len(frozen),
        f"{trained:,}",
    )
    return sorted(frozen)
