"""The rope scaling keeps its contract, and is what it says."""

from __future__ import annotations

import pytest
from my_plugin.rope_scaling import moelab_rope_scalings

from moelab import testing

(COMPONENT,) = moelab_rope_scalings()


@pytest.mark.parametrize("check", testing.ROPE_SCALING_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.RopeScalingCase(COMPONENT))


def test_a_factor_of_one_changes_nothing():
    plain = COMPONENT.build(COMPONENT.options(factor=1.0), testing.RopeScalingCase(COMPONENT).context)
    assert plain.power == 1.0
