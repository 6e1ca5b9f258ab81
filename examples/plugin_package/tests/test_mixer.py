"""The mixer keeps its contract, and the smaller half counts twice."""

from __future__ import annotations

import pytest
from my_plugin.mixer import moelab_mixers

from moelab import MixContext, testing

(COMPONENT,) = moelab_mixers()


@pytest.mark.parametrize("check", testing.MIXER_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.MixerCase(COMPONENT))


def test_the_smaller_half_counts_twice():
    mixer = testing.MixerCase(COMPONENT).build(MixContext({"a": 10, "b": 30, "c": 5, "d": 100}, 1000))
    assert mixer.phases[0].weights == {"a": 20, "b": 30, "c": 10, "d": 100}
