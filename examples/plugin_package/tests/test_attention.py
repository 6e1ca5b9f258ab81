"""The attention keeps its contract, and is what it says."""

from __future__ import annotations

import pytest
import torch
from my_plugin.attention import moelab_attentions

from moelab import testing

(COMPONENT,) = moelab_attentions()


@pytest.mark.parametrize("check", testing.ATTENTION_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.AttentionCase(COMPONENT))


def test_it_is_what_its_definition_says():
    def definition(i, j):
        return i - j, (i - j < 5) | (j < 2), torch.ones(())

    testing.check_attention(COMPONENT, {"first": 2, "last": 5}, definition)
