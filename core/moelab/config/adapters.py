"""`train.adapters`: which matrices learn through a low-rank product, and how it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moelab.errors import ConfigError

KEY = "train.adapters"
INITS = ("kaiming", "gaussian")  # nn/low_rank.py has each


@dataclass
class AdapterConfig:
    """W + (alpha / r) B A for each matrix whose name matches: A [r, in] is drawn, B [out, r] begins at zero."""

    target: str  # a pattern over names of parameters, as train.freeze has them: layers.*.mlp.experts.*
    r: int = 8  # rank of B A; of a bank each expert has its own
    alpha: float = 16.0  # over r it is the factor of B A
    init: str = "kaiming"  # of A: kaiming, uniform within 1 / sqrt(in); gaussian, of deviation 1 / r


def check_adapters(chosen: Sequence[AdapterConfig]) -> None:
    """Raise ConfigError for values out of range, naming the key."""
    for index, one in enumerate(chosen):
        where = f"{KEY}.{index}"
        if one.r < 1:
            raise ConfigError(f"{where}.r: must be at least 1, not {one.r}")
        if one.alpha <= 0:
            raise ConfigError(f"{where}.alpha: must be positive, not {one.alpha}")
        if one.init not in INITS:
            raise ConfigError(f"{where}.init: must be one of {', '.join(INITS)}, not '{one.init}'")
