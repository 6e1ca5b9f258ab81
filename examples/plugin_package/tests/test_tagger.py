"""The tagger keeps its contract, and finds questions."""

from __future__ import annotations

import pytest
from my_plugin.tagger import moelab_taggers

from moelab import Document, testing

(COMPONENT,) = moelab_taggers()


@pytest.mark.parametrize("check", testing.TAGGER_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.TaggerCase(COMPONENT))


def test_a_question_is_told():
    apply = testing.TaggerCase(COMPONENT).build()
    assert [apply(Document(text, "d", "n")) for text in ("Why?", "Because.")] == ["question", "none"]
