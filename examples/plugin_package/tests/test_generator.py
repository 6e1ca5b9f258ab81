"""The generator keeps its contract, and shouts."""

from __future__ import annotations

import pytest
from my_plugin.generator import moelab_generators

from moelab import Question, testing

(COMPONENT,) = moelab_generators()


@pytest.mark.parametrize("check", testing.GENERATOR_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.GeneratorCase(COMPONENT))


def test_it_shouts():
    (reply,) = testing.GeneratorCase(COMPONENT).build()([Question([{"role": "user", "content": "hello"}], seed=0)])
    assert reply.text == "HELLO!"
    assert reply.ended
