"""The gated activation of Qwen2, Llama, Mixtral, DeepSeek and most others."""

from __future__ import annotations

from dataclasses import dataclass

from moelab import Activation, ActivationContext, Component, component, hookimpl
from moelab.moe.activation import SwiGLU


@dataclass
class SwiGLUOptions:
    pass


def swiglu(options: SwiGLUOptions, context: ActivationContext) -> Activation:
    """silu(gate) * up.

    Formula: y = down(silu(gate x) * (up x)).
    Source: Shazeer 2020, "GLU Variants Improve Transformer" (2002.05202).
    Use: the default; checkpoints of Qwen2, Qwen3, Mixtral and their kin.
    Cost: three matrices, 3 D F parameters an expert; on a CPU the reference that others' rates are told beside.
    """
    return SwiGLU()


@hookimpl
def moelab_activations() -> list[Component[ActivationContext, Activation]]:
    return [component("swiglu", SwiGLUOptions, swiglu)]
