"""One load-balance coefficient in the five conventions in use.

They differ in what perfect balance costs at a coefficient of one, and in whether layers are summed.
"""

from __future__ import annotations

from dataclasses import dataclass

from moelab.errors import ConfigError, near


@dataclass(frozen=True)
class Convention:
    """What a program adds to the loss, in units of E sum_i f_i P_i (sum f = 1) meaned over layers."""

    times_top_k: bool
    times_layers: bool
    says: str


CONVENTIONS = {
    "moelab": Convention(False, False, "E sum f P, f summing to one; mean over layers. Balanced: 1"),
    "huggingface": Convention(True, False, "load_balancing_loss_func: f summing to K, layers pooled. Balanced: K"),
    "megatron": Convention(False, True, "Megatron-Core: E sum f P for each layer, layers summed. Balanced: L"),
    "megablocks": Convention(False, False, "MegaBlocks: divided by layers, tokens and K. Balanced: 1"),
    "deepspeed": Convention(
        False, True, "DeepSpeed: mean(m_e c_e) E^2 of the first choice, layers summed. Balanced: L"
    ),
}


def convert_coefficient(value: float, source: str, target: str, *, top_k: int, num_layers: int) -> float:
    """The coefficient that in `target`'s convention adds to the loss what `value` does in `source`'s.

    top_k: experts per token; num_layers: MoE layers. Exact for megatron and moelab at any load; for huggingface where
    the layers' loads agree, as it pools them; for deepspeed at K = 1, as it counts first choices.
    """
    return value * _scale(source, top_k, num_layers) / _scale(target, top_k, num_layers)


def _scale(name: str, top_k: int, num_layers: int) -> float:
    if name not in CONVENTIONS:
        raise ConfigError(f"convention: no '{name}'{near(name, CONVENTIONS)} Known: {', '.join(CONVENTIONS)}")
    convention = CONVENTIONS[name]
    return (top_k if convention.times_top_k else 1) * (num_layers if convention.times_layers else 1)
