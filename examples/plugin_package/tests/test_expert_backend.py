"""The backend computes what the definition says, forward and backward."""

from __future__ import annotations

import pytest
from my_plugin.expert_backend import moelab_expert_backends

from moelab import testing

(COMPONENT,) = moelab_expert_backends()


@pytest.mark.parametrize("check", testing.BACKEND_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.BackendCase(COMPONENT))
