"""One load-balance coefficient in the seven conventions in use.

They differ in what perfect balance costs at a coefficient of one, and in whether layers are summed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moelab.errors import ConfigError, near


@dataclass(frozen=True)
class Convention:
    """What a program adds to the loss, in units of E sum_i f_i P_i (sum f = 1) meaned over layers."""

    times_top_k: bool
    times_layers: bool
    says: str
    unless: str | None = None  # where a converted coefficient is not exact at every load
    inexact_at: Callable[[int], bool] = lambda top_k: False


CONVENTIONS = {
    "moelab": Convention(False, False, "E sum f P, f summing to one; mean over layers. Balanced: 1"),
    "huggingface": Convention(True, False, "load_balancing_loss_func: f summing to K, layers pooled. Balanced: K",
                              "layers differ in their loads: it pools them before it multiplies", lambda top_k: True),
    "megatron": Convention(False, True, "Megatron-Core: E sum f P for each layer, layers summed. Balanced: L"),
    "megablocks": Convention(False, False, "MegaBlocks: divided by layers, tokens and K. Balanced: 1"),
    "deepspeed": Convention(False, True, "DeepSpeed: mean(m_e c_e) E^2 for each layer, layers summed. Balanced: L",
                            "K = 2: its top2gating counts first choices alone", lambda top_k: top_k == 2),
    "mesh": Convention(False, True, "mesh-tensorflow: mean(m_e c_e) E^2 of first choices, layers added. Balanced: L",
                       "K > 1: it counts first choices alone", lambda top_k: top_k > 1),
    "t5x": Convention(True, False, "T5X, flaxformer: f summing to K, mean over layers. Balanced: K"),
}  # fmt: skip


def convert_coefficient(value: float, source: str, target: str, *, top_k: int, num_layers: int) -> float:
    """The coefficient that in `target`'s convention adds to the loss what `value` does in `source`'s.

    top_k: experts per token; num_layers: MoE layers. Exact at any load for moelab, megatron, megablocks and t5x; for
    huggingface where the layers' loads agree, as it pools them; for deepspeed but at K = 2 (its top2gating counts first
    choices alone, top1gating and topkgating all K); for mesh at K = 1, or with a router that shows first choices
    (gshard). That DeepSpeed's layers are summed is up to its caller: it returns each layer's loss.
    Raises ConfigError for a name that is none of CONVENTIONS.
    """
    return value * _scale(source, top_k, num_layers) / _scale(target, top_k, num_layers)


def inexact(source: str, target: str, top_k: int) -> list[str]:
    """Why a coefficient converted between the two is not exact at every load; empty where it is."""
    if source == target:
        return []
    return [
        f"{name}: not exact where {one.unless}"
        for name in (source, target)
        if (one := find_convention(name)).inexact_at(top_k)
    ]


def find_convention(name: str) -> Convention:
    """The convention of that name, or ConfigError listing them."""
    if name not in CONVENTIONS:
        raise ConfigError(f"convention: no '{name}'{near(name, CONVENTIONS)} Known: {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def _scale(name: str, top_k: int, num_layers: int) -> float:
    convention = find_convention(name)
    return (top_k if convention.times_top_k else 1) * (num_layers if convention.times_layers else 1)
