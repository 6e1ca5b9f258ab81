"""The tables of `moelab agreement`: of every domain what its documents alone would say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moelab.routes.agreement import LayerAgreement, compare_routes
from moelab.routes.trace import Trace
from moelab_tools.routes.agreeing import rows, told_by_domain
from traced_models import traced

NAMES = ("first", "second")


def of_domain(trace: Trace, domain: str) -> np.ndarray:
    """[T] bool: the tokens of its documents."""
    ours = np.array([own == domain for _, own in trace.documents])
    return ours[trace.document_id.ravel()]


def closed_form(a: Trace, b: Trace, layer: int, tokens: np.ndarray) -> tuple[float, float, float]:
    """(equal, same top expert, by chance) of some tokens by a loop over them."""
    one, other = a.layers[layer], b.layers[layer]
    sets = [
        [set(x.expert[i:j].tolist()) for i, j in zip(x.starts[:-1], x.starts[1:], strict=True)] for x in (one, other)
    ]
    pairs = [(sets[0][t], sets[1][t]) for t in np.flatnonzero(tokens)]
    wanted = sum(max(len(x), len(y)) for x, y in pairs)
    top = np.mean((one.heaviest()[0] == other.heaviest()[0])[tokens])
    loads = np.array([[sum(e in side[n] for side in pairs) for e in range(one.num_experts)] for n in (0, 1)])
    return sum(len(x & y) for x, y in pairs) / wanted, float(top), float(loads[0] @ loads[1] / len(pairs) / wanted)


@pytest.mark.parametrize("router", [{"name": "softmax_topk"}, {"name": "top_p", "top_p": 0.6}], ids=str)
def test_a_domain_is_told_as_its_tokens_alone_would_be(router: dict[str, Any]) -> None:
    a, b = traced(router)[1], traced(router, seed=7)[1]
    for layer, row in enumerate(rows(compare_routes(a, b, NAMES), a)[:-1]):
        assert list(row.by_domain) == ["x", "y"]
        everything = np.ones(a.tokens, bool)
        for part, tokens in [(row.whole, everything), *((row.by_domain[d], of_domain(a, d)) for d in "xy")]:
            assert (part.equal.value, part.same_top.value, part.chance) == pytest.approx(
                closed_form(a, b, layer, tokens)
            )
        assert (row.by_domain["x"].equal.documents, row.by_domain["y"].equal.documents) == (2, 1)
        assert row.by_domain["x"].equal.half is not None
        assert row.by_domain["y"].equal.half is None, "one document says nothing of the next"


def test_where_one_domain_alone_was_sent_elsewhere_the_other_agrees_wholly() -> None:
    a = traced({"name": "softmax_topk"})[1]
    moved = of_domain(a, "y").repeat(2)
    b = replace(a, layers=[replace(one, expert=np.where(moved, one.expert + 8, one.expert) % 16, num_experts=16)
                           for one in a.layers])  # fmt: skip
    wide = replace(a, layers=[replace(one, num_experts=16) for one in a.layers])
    for row in rows(compare_routes(wide, b, NAMES), wide):
        assert (row.by_domain["x"].equal.value, row.by_domain["y"].equal.value) == (1.0, 0.0)
        assert row.whole.equal.value == pytest.approx(of_domain(a, "x").mean())
        assert row.whole.to_json()["chance"] > row.by_domain["y"].chance == 0.0


def test_a_domain_of_no_assignments_has_no_row_and_a_single_domain_no_table() -> None:
    a = traced({"name": "softmax_topk"})[1]
    found = compare_routes(a, a, NAMES)
    without = [_without(one, np.array([False, True, False])) for one in found]
    told = rows(without, a)
    assert all(list(row.by_domain) == ["x"] for row in told)
    assert told_by_domain(told) == []
    lines = told_by_domain(rows(found, a))
    assert [line.split()[:2] for line in lines[2:]] == [[d, layer] for d in "xy" for layer in ("0", "1", "all")]
    assert all(len(line) <= 80 for line in lines)
    long = replace(a, documents=[(name, f"a_domain_of_a_long_name_{domain}") for name, domain in a.documents])
    assert [line.split()[0][-2:] for line in told_by_domain(rows(found, long))[2:]] == ["_x"] * 3 + ["_y"] * 3


def _without(one: LayerAgreement, documents: np.ndarray) -> LayerAgreement:
    """As if the layer had served none of these documents' tokens."""
    names = ("equal", "wanted", "same_top", "tokens")
    return replace(one, **{name: np.where(documents, 0, getattr(one, name)) for name in names})
