"""The observer keeps its contract, and remembers the best."""

from __future__ import annotations

import json

import pytest
from my_plugin.observer import moelab_observers

from moelab import testing

(COMPONENT,) = moelab_observers()


@pytest.mark.parametrize("check", testing.OBSERVER_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check):
    check(testing.ObserverCase(COMPONENT))


def test_the_lowest_is_kept(tmp_path):
    observer = COMPONENT.build(COMPONENT.options(), tmp_path)
    for step, loss in enumerate([3.0, 2.0, 2.5]):
        observer.on_evaluate(step, {"eval/loss": loss})
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 1, "metric": "eval/loss", "value": 2.0}
