"""The router keeps its contract, and its temperature flattens."""

from __future__ import annotations

import pytest
from my_plugin.router import moelab_routers

from moelab import testing

(COMPONENT,) = moelab_routers()


@pytest.mark.parametrize("check", testing.ROUTER_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.RouterCase(COMPONENT))


def test_a_higher_temperature_is_flatter():
    def largest(temperature):
        case = testing.RouterCase(COMPONENT, {"temperature": temperature})
        return case.route(case.build(), case.info(training=True)).scores.max(-1).values

    assert (largest(2.0) < largest(1.0)).all()
