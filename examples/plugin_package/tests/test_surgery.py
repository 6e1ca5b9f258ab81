"""The surgery keeps its contract, and the experts of the smallest weights go."""

from __future__ import annotations

import pytest
from my_plugin.surgery import moelab_surgeries

from moelab import testing

(COMPONENT,) = moelab_surgeries()


@pytest.mark.parametrize("check", testing.SURGERY_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.SurgeryCase(COMPONENT))


def test_the_smallest_go():
    case = testing.SurgeryCase(COMPONENT, {"num_experts": 6})
    case.tensors["experts.down"][[2, 5]] *= 0.1
    assert [expert.sources for expert in case.plan().experts] == [(0,), (1,), (3,), (4,), (6,), (7,)]
