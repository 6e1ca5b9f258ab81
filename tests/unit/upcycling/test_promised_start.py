"""What a recipe promises of its first loss, by what its parts say of themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moelab.hookspecs import EXPERT_INITIALISERS
from moelab.initialisers import UpcycleContext
from moelab.moe.layout import ExpertLayout
from moelab_upcycling.promised_start import promised_start
from moelab_upcycling.worker import light_registry

NAMES = {"shared": {"name": "zero"}, "router": {"name": "normal"}, "scaling": {"name": "none"}}


@pytest.mark.parametrize(
    ("scale", "normed", "kind"),
    [(0.0, True, "dense"), (0.02, True, "near"), (0.5, True, "far"), (0.02, False, "far")],
)
def test_a_small_difference_promises_a_near_start_and_a_large_one_none(scale: float, normed: bool, kind: str) -> None:
    """Not beside a shared expert that adds something, and not where weights of the chosen don't sum to one."""
    context = UpcycleContext(
        hidden_size=48, intermediate_size=96, layer_id=0, num_hidden_layers=4, layout=ExpertLayout(4, 2, 96),
        shared_intermediate_size=64, norm_topk_prob=normed, initializer_range=0.02, seed=0,
    )  # fmt: skip
    node = {"name": "deltas", "scale": scale}
    experts = light_registry((), False, ()).build(EXPERT_INITIALISERS, node, context, "recipe.experts")
    parts: Any = SimpleNamespace(experts=experts, shared=None, scaling=SimpleNamespace(share=1.0))
    for other, wanted in (({}, kind), ({"shared": {"name": "random"}}, "far")):
        recipe = SimpleNamespace(**NAMES | other, silence=None)
        plan: Any = SimpleNamespace(recipe=recipe, target=SimpleNamespace(norm_topk_prob=normed))
        assert promised_start(plan, parts).kind == wanted
