"""Rewards of a config: what is told of those that can't be, and how several are summed."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

import moelab
from moelab.alignment.judge import Judge, build_judge, resolve_rewards
from moelab.data.rewards import Attempt, RewardContext
from moelab.errors import ConfigError, DataError, RunFailure
from moelab.registry import Registry

WHERE = "alignment.0.reward"


@dataclass
class Options:
    answer: str = "nan"


ANSWERS: dict[str, Any] = {
    "nan": [float("nan")], "none": None, "text": "1.0", "short": [], "words": ["1.0"], "right": [1.0],
}  # fmt: skip


def strange(options: Options, context: RewardContext) -> moelab.Reward:
    def judge(attempts: Sequence[Attempt]) -> Any:
        if options.answer == "exit":
            sys.exit(0)
        return ANSWERS[options.answer]

    return judge


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    module = types.ModuleType("strange_lab")
    strange.__module__ = "strange_lab"
    module.moelab_rewards = moelab.hookimpl(  # type: ignore[attr-defined]
        lambda: [moelab.component("strange", Options, strange)], specname="moelab_rewards"
    )
    monkeypatch.setitem(sys.modules, "strange_lab", module)
    return Registry(["strange_lab"], entry_points=False)


def judge_of(registry: Registry, *said: dict[str, Any]) -> Judge:
    return build_judge(list(said), registry, RewardContext(where=WHERE))


def attempt(text: str, **fields: Any) -> Attempt:
    return Attempt("ask", text, fields, "rows.jsonl:3", tokens=len(text))


def test_several_rewards_are_summed_by_weight_and_told_apart(registry: Registry) -> None:
    judge = judge_of(
        registry, {"name": "exact_answer", "weight": 2}, {"name": "length", "most": 1, "slack": 0, "weight": -0.5}
    )
    total, parts = judge([attempt("4", answer=4), attempt("four", answer="FOUR"), attempt("five", answer=4)])
    assert parts == {"exact_answer": [1.0, 1.0, 0.0], "length": [1.0, 0.0, 0.0]}
    assert total == [1.5, 2.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ("nan", RunFailure, r"alignment\.0\.reward: reward 'strange' of .*: is nan for an answer to rows\.jsonl:3"),
        ("none", ConfigError, r"reward 'strange' of .*: returned None; it must return a list of 1 numbers"),
        ("text", ConfigError, r"returned a str"),
        ("short", ConfigError, r"returned 0 numbers for 1 attempts"),
        ("words", ConfigError, r"returned a str among its numbers"),
        ("raise", ConfigError, r"reward 'strange' of .*: raised KeyError: "),
        ("exit", ConfigError, r"reward 'strange' of .*: raised SystemExit: 0"),
    ],
)
def test_a_reward_that_breaks_its_promise_is_told_of_in_one_line(
    registry: Registry, answer: str, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        judge_of(registry, {"name": "strange", "answer": answer})([attempt("x")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([], r"alignment\.0\.reward: is empty"),
        ([{"name": "exact"}], r"alignment\.0\.reward\.name: no reward 'exact'.*exact_answer"),
        ({"name": "length"}, r"alignment\.0\.reward: 'length'.*least or most: give one"),
        ([{"name": "length", "most": 1}] * 2, r"reward\.1\.name: 'length' is there already"),
        ({"name": "length", "most": 1, "weight": "much"}, r"reward\.weight: must be a number, not 'much'"),
        ({"name": "doctest"}, r"allow_code_execution: is false, and this reward runs code"),
        ({"name": "exact_answer", "take": "pattern", "pattern": "####"}, r"has no group"),
    ],
)
def test_what_cant_be_a_reward_is_refused_by_its_key(registry: Registry, said: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_rewards(said, registry, WHERE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"solution": 4}, r"rows\.jsonl:3: has no answer, which reward 'exact_answer' reads"),
        ({"answer": None}, r"rows\.jsonl:3: answer: must be a text or a whole number or a number or a list, not null"),
        ({"answer": True}, r"rows\.jsonl:3: answer: must be"),
    ],
)
def test_a_line_without_what_a_reward_reads_is_told_of(registry: Registry, fields: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        judge_of(registry, {"name": "exact_answer"}).check("rows.jsonl:3", fields)
