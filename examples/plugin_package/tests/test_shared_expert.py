"""The shared expert keeps its contract, and has the width that was asked for."""

from __future__ import annotations

import pytest
from my_plugin.shared_expert import moelab_shared_experts

from moelab import testing

(COMPONENT,) = moelab_shared_experts()


@pytest.mark.parametrize("check", testing.SHARED_EXPERT_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.SharedExpertCase(COMPONENT))


def test_it_is_a_share_as_wide_as_an_expert():
    case = testing.SharedExpertCase(COMPONENT, {"share": 0.25})
    assert case.build().intermediate_size == case.context.moe_intermediate_size // 4
