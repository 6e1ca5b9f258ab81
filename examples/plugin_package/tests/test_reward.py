"""The reward keeps its contract, and likes its word."""

from __future__ import annotations

import pytest
from my_plugin.reward import moelab_rewards

from moelab import Attempt, testing

(COMPONENT,) = moelab_rewards()


@pytest.mark.parametrize("check", testing.REWARD_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.RewardCase(COMPONENT))


def test_its_word_is_worth_more():
    judge = testing.RewardCase(COMPONENT).build()
    assert judge([Attempt("Ask.", text, {}, "here") for text in ("Yes, please.", "Yes.")]) == [1.0, 0.0]
