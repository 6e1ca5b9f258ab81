"""What every reward must do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moelab.alignment.rewards import Attempt, Reward, RewardContext, needs_of, reward_fault
from moelab.components import Component
from moelab.paths import Places
from moelab.testing.report import make_options, promised, run_checks

ANSWERS = (
    "", " \n", "4", "The answer is 4.", "four, I think", "def f(x):\n    return 2 * x\n",
    "```python\ndef f(x):\n    return 3 * x\n```", "\x00\ufeff中文 \U0001f600", "{\"a\": 1}", "x" * 3000,
)  # fmt: skip
FIELDS: Mapping[str, Any] = {"answer": "4", "tests": ">>> f(2)\n4\n"}


@dataclass
class RewardCase:
    """One reward under test."""

    component: Component[RewardContext, Reward]
    options: Any = None
    base: Path = Path()  # relative paths count from here, as from a config file's folder
    fields: Mapping[str, Any] = field(default_factory=lambda: dict(FIELDS))  # of the prompt's line
    answers: Sequence[str] = ANSWERS

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)

    def build(self) -> Reward:
        return self.component.build(self.options, RewardContext(Places(search=(self.base,))))

    def attempts(self) -> list[Attempt]:
        blank = Attempt("2+2=", "", self.fields, "kit.jsonl:1")
        return [
            replace(blank, text=text, ids=np.arange(len(text) + 4, dtype=np.int32) % 250, tokens=len(text))
            for text in self.answers
        ]


def answers_with_a_finite_number_for_each(case: RewardCase) -> None:
    """Whatever an answer holds, nothing at all too."""
    attempts = case.attempts()
    apply = case.build()
    for key in needs_of(apply):
        assert key in case.fields, f"needs '{key}', which the case's fields lack; give RewardCase(fields={{...}})"
    for some in (attempts, attempts[:1]):
        found = apply(some)
        promised(reward_fault(found, len(some)), apply)
        for value, attempt in zip(found, some, strict=True):
            assert math.isfinite(value), f"is {value} for the answer {attempt.text[:40]!r}; it must be a finite number"


def says_the_same_again_in_other_company(case: RewardCase) -> None:
    """What an answer is worth hangs on it alone, so that a run that is resumed draws the same pairs."""
    apply, attempts = case.build(), case.attempts()
    forth = list(map(float, apply(attempts)))
    back = list(map(float, apply(attempts[::-1])))[::-1]
    alone = [float(case.build()([attempt])[0]) for attempt in attempts[:3]]
    same = all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) for a, b in zip(forth, back, strict=True))
    same = same and all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) for a, b in zip(forth[:3], alone, strict=True))
    assert same, f"another worth in other company: {forth}, reversed {back}, alone {alone}"


REWARD_CHECKS: tuple[Callable[[RewardCase], None], ...] = (
    answers_with_a_finite_number_for_each,
    says_the_same_again_in_other_company,
)


def check_reward(
    component: Component[RewardContext, Reward],
    options: Any = None,
    *,
    base: Path = Path(),
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Run every check of REWARD_CHECKS on a prompt with `fields`; raises ConformanceError naming those that fail."""
    case = RewardCase(component, options, base, dict(FIELDS if fields is None else fields))
    run_checks("reward", component, case, REWARD_CHECKS)
