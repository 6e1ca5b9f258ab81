"""The source keeps its contract, for a folder whose FFN goes by other names."""

from __future__ import annotations

import pytest
from my_plugin.dense_source import NAMES, moelab_dense_sources

from moelab import testing
from moelab.hf.names import hf_shapes, parameter_shapes

(COMPONENT,) = moelab_dense_sources()


def renamed(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("check", testing.DENSE_SOURCE_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    model = hf_shapes(parameter_shapes(testing.DenseSourceCase(COMPONENT).config(), {}))
    check(testing.DenseSourceCase(COMPONENT, stored={renamed(name): shape for name, shape in model.items()}))
