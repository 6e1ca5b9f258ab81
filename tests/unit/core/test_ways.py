"""Ways: who answers, what is measured, and that every way of a place computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor

from moelab import BackendContext, Routing
from moelab.hookspecs import EXPERT_BACKENDS
from moelab.moe.experts import ExpertBank
from moelab.moe.layout import ExpertLayout
from moelab.nn.full_attention import fastest as attend
from moelab.nn.full_attention import torch_attention
from moelab.nn.linear import MKL, ONEDNN, WHOLLY, Linear, _by_onednn
from moelab.registry import Registry
from moelab.ways import (
    ENOUGH,
    ROUNDS,
    Found,
    Measuring,
    Ways,
    active,
    choose,
    fastest,
    measure,
    take_turns,
    trial,
    using,
)


def _unasked() -> Mapping[str, Callable[[], object]]:
    raise AssertionError("nothing is to be measured here")


def test_without_a_table_constants_answer() -> None:
    assert choose("a product", "usual", _unasked) == "usual"
    assert active() is None


def test_a_table_answers_for_what_it_holds_and_measures_nothing() -> None:
    with using(Ways({"a product": "other"})):
        assert choose("a product", "usual", _unasked) == "other"
        assert choose(lambda: "another", "usual", _unasked) == "usual"
    assert choose("a product", "usual", _unasked) == "usual"


def test_tables_lie_over_each_other_and_none_changes_nothing() -> None:
    with using(Ways({"p": "outer"})):
        with using(Ways({"p": "inner"})):
            assert choose("p", "usual", _unasked) == "inner"
        with using(None):
            assert choose("p", "usual", _unasked) == "outer"


@pytest.mark.parametrize(
    ("seconds", "way"),
    [
        ({"usual": 1.0, "other": 0.94}, "other"),
        ({"usual": 1.0, "other": 0.96}, "usual"),  # within what chance does
        ({"usual": 1.0, "other": 2.0}, "usual"),
        ({"usual": 1.0, "other": 0.9, "third": 0.5}, "third"),
    ],
)
def test_another_way_is_taken_where_it_is_faster_by_more_than_chance(seconds: dict[str, float], way: str) -> None:
    assert fastest(seconds, "usual") == way


class _Clock:
    """Each way takes the seconds that it is said to take."""

    def __init__(self, seconds: Mapping[str, list[float]]) -> None:
        self.now, self.calls = 0.0, dict.fromkeys(seconds, 0)
        self._seconds: dict[str, Iterator[float]] = {way: iter(values) for way, values in seconds.items()}

    def call(self, way: str) -> Callable[[], object]:
        def call() -> None:
            self.calls[way] += 1
            self.now += next(self._seconds[way])

        return call

    def __call__(self) -> float:
        return self.now


def test_a_measurement_leaves_the_first_call_out_and_takes_medians() -> None:
    clock = _Clock({"a": [100.0, 1.0, 2.0, 9.0], "b": [0.001, 5.0, 3.0, 4.0]})
    found = measure({way: clock.call(way) for way in ("a", "b")}, clock)
    assert found == pytest.approx({"a": 2.0, "b": 4.0})
    assert clock.calls == {"a": 1 + ROUNDS[0], "b": 1 + ROUNDS[0]}


def test_short_calls_are_measured_more_often_but_not_for_ever() -> None:
    short, many = ENOUGH / 20, 100
    clock = _Clock({"a": [short] * many, "b": [short] * many})
    measure({way: clock.call(way) for way in ("a", "b")}, clock)
    assert 1 + ROUNDS[0] < clock.calls["a"] == clock.calls["b"] < 1 + ROUNDS[1]


def test_every_way_has_its_turn_at_every_problem_that_has_it_after_what_comes_before() -> None:
    done: list[str] = []
    problems = [
        {way: partial(done.append, way + number) for way in ways} for number, ways in (("1", "ab"), ("2", "bc"))
    ]
    now = iter(range(1000))  # each look at the clock is a second later
    taken = take_turns(problems, (2, 9), partial(done.append, "before"), lambda: float(next(now)))
    forwards = ["before", "a1", "before", "b1", "b2", "before", "c2"]
    backwards = ["before", "c2", "before", "b1", "b2", "before", "a1"]
    assert done == forwards + backwards + forwards
    assert taken == [{"a": [1.0, 1.0], "b": [1.0, 1.0]}, {"b": [1.0, 1.0], "c": [1.0, 1.0]}]


def test_a_problem_is_measured_once_and_what_is_known_is_not() -> None:
    calls: list[str] = []
    candidates = lambda: {"usual": lambda: calls.append("u"), "other": lambda: calls.append("o")}  # noqa: E731
    table = Measuring({"known": Found("other", {"usual": 2.0, "other": 1.0})})
    with using(table):
        assert choose("known", "usual", candidates) == "other"
        assert not calls and not table.fresh
        first = choose("new", "usual", candidates)
        measured = len(calls)
        assert measured and table.fresh == ["new"]
        assert choose("new", "usual", candidates) == first
    assert len(calls) == measured
    assert table.chosen.keys() == table.found.keys() == {"known", "new"}


@pytest.mark.parametrize(
    "stale", [Found("gone", {"usual": 2.0, "other": 1.0}), Found("other", {"usual": 2.0, "third": 1.0})]
)
def test_what_is_known_of_other_ways_than_there_are_is_measured_anew(stale: Found) -> None:
    table = Measuring({"problem": stale})
    with using(table):
        choose("problem", "usual", lambda: {"usual": lambda: None, "other": lambda: None})
    assert table.fresh == ["problem"] and table.found["problem"].seconds.keys() == {"usual", "other"}


def test_a_trial_leaves_no_trace_and_goes_back_to_all_but_frozen_parameters() -> None:
    x, weight = torch.randn(3, 4), torch.nn.Parameter(torch.randn(2, 4))
    reached: list[tuple[bool, ...]] = []

    def product(*inputs: Tensor) -> Tensor:
        reached.append(tuple(one.requires_grad for one in inputs))
        return inputs[0] @ inputs[1].t()

    with torch.no_grad():
        trial(product, x, weight)()
    weight.requires_grad_(False)
    trial(product, x, weight)()
    assert reached == [(True, True), (True, False)]
    assert weight.grad is None and not x.requires_grad


def _ways_of(compute: Callable[[], object]) -> dict[str, dict[str, float]]:
    table = Measuring({})
    with using(table), torch.no_grad():
        compute()
    return {problem: found.seconds for problem, found in table.found.items()}


def _gradients(compute: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    own = [one.detach().clone().requires_grad_() for one in inputs]
    out = compute(*own)
    return (out.detach(), *torch.autograd.grad(out, own, torch.ones_like(out)))


def test_a_linear_layer_goes_the_way_that_the_table_says() -> None:
    layer, x = Linear(96, 128), torch.randn(4, 256, 96)
    ((problem, seconds),) = _ways_of(lambda: layer(x)).items()
    assert problem == "linear 1024 x 96 to 128" and seconds.keys() == {WHOLLY, ONEDNN, MKL}
    plain = _gradients(lambda x: torch.nn.functional.linear(x, layer.weight, layer.bias), x)
    with using(Ways({problem: MKL})):
        by_mkl = _gradients(layer, x)
    assert all(map(torch.equal, by_mkl, plain))
    for way, wholly in ((ONEDNN, False), (WHOLLY, True)):
        with using(Ways({problem: way})):
            by_onednn = _gradients(layer, x)
        direct = _gradients(lambda x: _by_onednn(x, layer.weight, layer.bias, wholly=wholly), x)  # noqa: B023
        assert all(map(torch.equal, by_onednn, direct))
        for one, two in zip(by_onednn, plain, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_goes_the_way_that_the_table_says(dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 4, 160, 16, dtype=dtype), torch.randn(2, 2, 160, 16, dtype=dtype)
    ((problem, seconds),) = _ways_of(lambda: attend(query, key, key, None)).items()
    assert seconds.keys() == {"blocks", "torch"}
    with using(Ways({problem: "torch"})):
        by_torch = _gradients(lambda q, k: attend(q, k, k, None), query, key)
    with using(Ways({problem: "blocks"})):
        by_blocks = _gradients(lambda q, k: attend(q, k, k, None), query, key)
    plain = _gradients(lambda q, k: torch_attention(q, k, k, None), query, key)
    assert all(map(torch.equal, by_torch, plain))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for one, two in zip(by_blocks, plain, strict=True):
        assert not torch.equal(one, two)  # it is the other one
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance * float(two.abs().max()))


def test_auto_goes_to_the_backend_that_the_table_says_and_tells_it() -> None:
    layout = ExpertLayout(4, 2, 16)
    bank = ExpertBank(layout, 24)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, expert = torch.randn(400, 24), torch.randint(0, 4, (400, 1)).expand(400, 2)
    routing = Routing.from_topk(expert, torch.rand(400, 2), 4)
    registry = Registry(entry_points=False)
    inner = BackendContext(layout, 24, 0, dict)
    names = ("batched", "grouped_mm", "loop")
    others = {name: registry.build(EXPERT_BACKENDS, {"name": name}, inner, "test") for name in names}
    auto = registry.build(EXPERT_BACKENDS, {"name": "auto"}, BackendContext(layout, 24, 0, lambda: others), "test")
    usual = auto(x, routing, bank)  # before: a choice by constants is no choice of the table
    ((problem, seconds),) = _ways_of(lambda: auto(x, routing, bank)).items()
    assert seconds.keys() == {"batched", "grouped_mm"}  # those that are ranked; the reference is none of them
    for name, told in (("grouped_mm", "little work"), ("batched", "measured faster than grouped_mm")):
        with using(Ways({problem: name})):
            assert torch.equal(auto(x, routing, bank), others[name](x, routing, bank))
        assert list(auto.choices.values()) == [f"{name} ({told})"]
    with using(Ways({problem: "a backend that is not installed here"})):
        assert torch.equal(auto(x, routing, bank), usual)
    assert all(parameter.grad is None for parameter in bank.parameters())
