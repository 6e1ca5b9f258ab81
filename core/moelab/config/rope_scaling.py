"""`rope_scaling` of a model: how the rotary embedding's wavelengths are stretched, in Hugging Face's words.

After transformers 5.23 (modeling_rope_utils.py: `_compute_llama3_parameters`, `_validate_llama3_rope_parameters`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from moelab.config.scalars import settle
from moelab.errors import ConfigError

# {rope_type: its numbers}; nn/rope.py computes them.
NUMBERS = {"llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def check_rope_scaling(scaling: Mapping[str, Any], where: str = "rope_scaling") -> dict[str, Any]:
    """`scaling` with every number typed. Raises ConfigError naming the key and what would do."""
    kind = scaling.get("rope_type")
    if kind not in NUMBERS:
        raise ConfigError(f"{where}.rope_type: must be one of {', '.join(NUMBERS)}, not {kind!r}; null is plain rotary")
    extra = sorted(map(str, scaling.keys() - {"rope_type", *NUMBERS[str(kind)]}))
    if extra:
        raise ConfigError(f"{where}.{extra[0]}: {kind} has no such key; it takes {', '.join(NUMBERS[str(kind)])}")
    found: dict[str, Any] = {"rope_type": str(kind)}
    for key in NUMBERS[str(kind)]:
        value = settle(scaling.get(key))
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value <= 0:
            raise ConfigError(f"{where}.{key}: must be a positive number, not {value!r}")
        found[key] = int(value) if key == "original_max_position_embeddings" else float(value)
    if found["factor"] < 1 or found["low_freq_factor"] >= found["high_freq_factor"]:
        raise ConfigError(f"{where}: factor must be at least 1, and low_freq_factor less than high_freq_factor")
    return found
