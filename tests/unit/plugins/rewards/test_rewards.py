"""The built-in rewards: what they are worth answers, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from moelab import Attempt, Registry, RewardContext
from moelab.hookspecs import REWARDS

REGISTRY = Registry(entry_points=False, points=[REWARDS])


def worth(node: dict[str, Any], text: str, prompt: Any = "ask", **more: Any) -> float:
    tokens, ended = more.pop("tokens", 1), more.pop("ended", True)
    attempt = Attempt(prompt, text, more, "rows.jsonl:1", tokens=tokens, ended=ended)
    (value,) = REGISTRY.build(REWARDS, node, RewardContext(), "reward")([attempt])
    return value


@pytest.mark.parametrize(
    ("options", "text", "answer", "right"),
    [
        ({}, " Four \n", "four", True),
        ({"case": True}, "Four", "four", False),
        ({}, "4.00", 4, True),
        ({}, "8/2", "4", True),
        ({}, "1,024", 1024, True),
        ({"numbers": False}, "4.0", "4", False),
        ({}, "1/0", "1/0", True),
        ({}, "", "4", False),
        ({}, "b", ["a", "b"], True),
        ({"take": "last_line"}, "so\n\nyes\n", "yes", True),
        ({"take": "last_number"}, "2 and 2 is 4.", 4, True),
        ({"take": "last_number"}, "4 and 2", 4, False),
        ({"take": "last_number"}, "none", 4, False),
        ({"take": "pattern", "pattern": r"^#### (.+)$"}, "2+2\n#### 4\n", 4, True),
    ],
)
def test_an_answer_is_exact_in_what_counts_alone(options: Any, text: str, answer: Any, right: bool) -> None:
    assert worth({"name": "exact_answer", **options}, text, answer=answer) == right


def test_rules_of_format_count_by_their_share() -> None:
    node = {"name": "format", "contains": [r"^#### \d+$"], "lacks": ["sorry"], "ended": True, "json": False}
    assert worth(node, "so\n#### 4") == 1.0
    assert worth(node, "sorry") == pytest.approx(1 / 3)
    assert worth(node, "#### 4", ended=False) == pytest.approx(2 / 3)
    assert worth({"name": "format", "json": True}, '```json\n{"a": 1}\n```') == 1.0
    assert worth({"name": "format", "json": True}, "{a: 1}") == 0.0
    assert worth({"name": "format", "json": True}, "[" * 100_000) == 0.0


def test_length_falls_in_a_straight_line_on_both_sides() -> None:
    node = {"name": "length", "least": 3, "most": 5, "slack": 1}
    assert [worth(node, "", tokens=n) for n in range(9)] == [0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert worth({"name": "length", "most": 5, "slack": 0, "unit": "characters"}, "123456") == 0.0
    assert worth({"name": "length", "least": 2, "slack": 0, "unit": "words"}, "one two") == 1.0


RUNS = {"name": "doctest", "allow_code_execution": True, "seconds": 2}
TESTS = ">>> twice(2)\n4\n>>> twice('a')\n'aa'\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("def twice(x):\n    return 2 * x\n", 1.0),
        ("Like this:\n```python\ndef twice(x):\n    return x + x\n```\nGood luck.", 1.0),
        ("def twice(x):\n    return 4\n", 0.5),
        ("def twice(x:", 0.0),
        ("", 0.0),
        ("raise SystemExit", 0.0),
        ("import os\nos._exit(0)", 0.0),
        ("print('2/2')", 0.0),
    ],
)
def test_code_is_worth_the_share_of_examples_that_hold(text: str, value: float) -> None:
    assert worth(RUNS, text, tests=TESTS) == value


def test_examples_may_need_all_to_hold_code_before_or_the_prompt() -> None:
    assert worth({**RUNS, "partial": False}, "def twice(x):\n    return 4\n", tests=TESTS) == 0.0
    assert worth(RUNS, "def twice(x):\n    return mul(2, x)", tests=TESTS, setup="from operator import mul") == 1.0
    assert worth({**RUNS, "prompt_first": True}, "    return 2 * x", "def twice(x):\n", tests=TESTS) == 1.0


def test_an_example_that_never_ends_is_worth_nothing() -> None:
    assert worth({**RUNS, "seconds": 0.3}, "def twice(x):\n    while True: pass", tests=TESTS) == 0.0
