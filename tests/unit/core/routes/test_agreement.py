"""Agreement counts what a loop over tokens counts, and refuses what can't be compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moelab.errors import DataError
from moelab.routes.agreement import compare_routes
from moelab.routes.trace import LayerTrace
from traced_models import traced

NAMES = ("first", "second")


def _sets(layer: LayerTrace) -> list[set[int]]:
    return [set(layer.expert[a:b].tolist()) for a, b in zip(layer.starts[:-1], layer.starts[1:], strict=True)]


@pytest.mark.parametrize("router", [{"name": "softmax_topk"}, {"name": "top_p", "top_p": 0.6}], ids=str)
def test_the_sums_are_those_of_a_loop_over_tokens(router: dict[str, Any]):
    a, b = traced(router)[1], traced(router, seed=7)[1]
    document = a.document_id.ravel()
    for found, one, other in zip(compare_routes(a, b, NAMES), a.layers, b.layers, strict=True):
        pairs = list(zip(_sets(one), _sets(other), strict=True))
        equal = np.bincount(document, [len(x & y) for x, y in pairs])
        assert found.equal.tolist() == equal.tolist()
        assert found.wanted.tolist() == np.bincount(document, [max(len(x), len(y)) for x, y in pairs]).tolist()
        together = np.zeros((8, 8))
        for x, y in pairs:
            together[np.ix_(sorted(x), sorted(y))] += 1
        assert np.array_equal(found.together, together)
        assert found.chance() == pytest.approx(one.loads() @ other.loads() / len(pairs) / found.wanted.sum())
        assert 0 < found.same_top.sum() < found.tokens.sum()


def test_a_trace_agrees_with_itself_and_with_its_experts_renamed_only_by_name():
    trace = traced({"name": "softmax_topk"})[1]
    assert [one.share for one in compare_routes(trace, trace, NAMES)] == [1.0, 1.0]
    renamed = replace(trace, layers=[replace(one, expert=(one.expert + 1) % 8) for one in trace.layers])
    for found in compare_routes(trace, renamed, NAMES):
        assert found.share < 0.6
        assert found.together[np.arange(8), (np.arange(8) + 1) % 8].sum() == found.wanted.sum()


def test_other_text_tokenizers_and_layouts_are_refused():
    trace = traced({"name": "softmax_topk"})[1]
    changed = trace.token_id.copy()
    changed[0, 0] ^= 1
    with pytest.raises(DataError, match="different text"):
        compare_routes(trace, replace(trace, token_id=changed), NAMES)
    with pytest.raises(DataError, match="different tokenizers"):
        compare_routes(trace, replace(trace, facts=trace.facts | {"tokenizer": "else"}), NAMES)
    with pytest.raises(DataError, match="other MoE layers"):
        compare_routes(trace, traced({"name": "softmax_topk"}, layers=3)[1], NAMES)
