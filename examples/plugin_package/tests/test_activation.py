"""The activation keeps its contract, and a steep gate is a sign."""

from __future__ import annotations

import pytest
import torch
from my_plugin.activation import moelab_activations

from moelab import testing

(COMPONENT,) = moelab_activations()


@pytest.mark.parametrize("check", testing.ACTIVATION_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.ActivationCase(COMPONENT))


def test_a_steep_gate_is_a_sign():
    case = testing.ActivationCase(COMPONENT, {"slope": 1e4})
    gate, up = case.inputs()
    torch.testing.assert_close(case.build()(gate, up), gate.sign() * up)
