"""`rope_scaling` in the words of config.json: `rope_type`, in older files `type`, is a rope scaling's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PLAIN = "none"  # the rope scaling that changes nothing
HF_PLAIN = "default"  # as Hugging Face calls it
_KEYS = ("rope_type", "type")


@dataclass(frozen=True)
class RopeContext:
    """What the scaling of a rotary embedding may depend on when it is built."""

    head_dim: int
    rope_theta: float
    max_position_embeddings: int


def as_part(said: Mapping[str, Any]) -> dict[str, Any]:
    """{rope_type: ..., factor: ...} -> {name: ..., factor: ...}; what has a `name` stays as it is."""
    if "name" in said or not any(key in said for key in _KEYS):
        return dict(said)
    name = next(said[key] for key in _KEYS if key in said)
    rest = {key: value for key, value in said.items() if key not in _KEYS}
    return {"name": PLAIN if name == HF_PLAIN else name, **rest}
