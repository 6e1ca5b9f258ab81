"""The layout keeps its contract, and deeper layers have more experts."""

from __future__ import annotations

import pytest
from my_plugin.expert_layout import moelab_expert_layouts

from moelab import testing

(COMPONENT,) = moelab_expert_layouts()


@pytest.mark.parametrize("check", testing.EXPERT_LAYOUT_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.ExpertLayoutCase(COMPONENT))


def test_experts_rise_with_depth():
    layers = testing.ExpertLayoutCase(COMPONENT, {"num_experts": 8, "num_experts_per_tok": 2}).layers()
    assert [layout.num_experts for layout in layers.values()] == [2, 4, 6, 8]
