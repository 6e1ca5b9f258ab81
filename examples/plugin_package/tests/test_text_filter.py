"""The filter keeps its contract, and counts words."""

from __future__ import annotations

import pytest
from my_plugin.text_filter import moelab_text_filters

from moelab import Document, Rejected, testing

(COMPONENT,) = moelab_text_filters()


@pytest.mark.parametrize("check", testing.TEXT_FILTER_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.TextFilterCase(COMPONENT))


def test_a_word_too_often_is_a_reason():
    apply = testing.TextFilterCase(COMPONENT, {"word": "x", "most": 1}).build()
    assert isinstance(apply(Document("x y", "d", "n")), Document)
    assert apply(Document("x X y", "d", "n")) == Rejected("holds 'x' too often", "2 times, at most 1")
