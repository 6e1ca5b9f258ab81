"""The optimizer keeps its contract, and a step is as long as the rate."""

from __future__ import annotations

import pytest
import torch
from my_plugin.optimizer import moelab_optimizers

from moelab import testing
from moelab.config.run import OptimizerConfig

(COMPONENT,) = moelab_optimizers()


@pytest.mark.parametrize("check", testing.OPTIMIZER_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.OptimizerCase(COMPONENT))


def test_a_step_is_as_long_as_the_rate():
    case = testing.OptimizerCase(COMPONENT, settings=OptimizerConfig(lr=1e-2, weight_decay=0.0))
    stepped = case.build()
    before = stepped.values()["layers.0.o_proj.weight"]
    stepped.step(0)
    moved = (stepped.values()["layers.0.o_proj.weight"] - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), rtol=0, atol=1e-6)
