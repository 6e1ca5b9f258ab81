"""The initialiser keeps its contract, and neighbours have neighbouring neurons."""

from __future__ import annotations

import numpy as np
import pytest
from my_plugin.expert_initialiser import moelab_expert_initialisers

from moelab import testing

(COMPONENT,) = moelab_expert_initialisers()


@pytest.mark.parametrize("check", testing.INITIALISER_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.InitialiserCase(COMPONENT))


def test_the_next_expert_goes_on_where_the_last_ended():
    initialiser = testing.InitialiserCase(COMPONENT, width=4).build()
    both = np.concatenate([initialiser.plan(expert).source for expert in (0, 1)])
    assert np.array_equal(both, np.arange(8))
