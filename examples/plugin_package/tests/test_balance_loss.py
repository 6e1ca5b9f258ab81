"""The loss keeps its contract, and is 0 at perfect balance."""

from __future__ import annotations

import pytest
from my_plugin.balance_loss import moelab_balance_losses

from moelab import testing

(COMPONENT,) = moelab_balance_losses()


@pytest.mark.parametrize("check", testing.BALANCE_LOSS_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.BalanceLossCase(COMPONENT, balanced=0.0))
