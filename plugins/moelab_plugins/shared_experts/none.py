"""No shared expert."""

from __future__ import annotations

from dataclasses import dataclass

from moelab import Component, MoEContext, SharedExpert, component, hookimpl


@dataclass
class NoSharedOptions:
    pass


def no_shared_expert(options: NoSharedOptions, context: MoEContext) -> SharedExpert | None:
    """Tokens pass through their routed experts alone.

    Source: OLMoE (2409.02060) 4.1.3 found a shared expert slightly worse; DeepSeekMoE and Qwen2 found it better.
    Use: the baseline of every comparison of shared experts.
    Cost: none.
    """
    return None


@hookimpl
def moelab_shared_experts() -> list[Component[MoEContext, SharedExpert | None]]:
    return [component("none", NoSharedOptions, no_shared_expert)]
