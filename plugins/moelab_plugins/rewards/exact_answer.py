"""Whether an answer is the one that stands beside the prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from moelab import Attempt, Component, Reward, RewardContext, component, hookimpl

TAKEN = ("whole", "last_line", "last_number", "pattern")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|[-+]?\.\d+")
LONGEST = 100  # characters of what may be a number


@dataclass
class ExactAnswerOptions:
    key: str = "answer"  # of the prompt's line: a text, a number, or a list of those that are right
    take: str = "whole"  # what of an answer is compared: whole, last_line, last_number, or what `pattern` finds last
    pattern: str = ""  # of take: pattern, a regular expression whose first group counts, as "#### (.+)"
    numbers: bool = True  # 4, 4.0, 4.00 and 8/2 are the same answer
    case: bool = False  # capital letters count

    def __post_init__(self) -> None:
        if self.take not in TAKEN:
            raise ValueError(f"take: must be one of {', '.join(TAKEN)}, not '{self.take}'")
        if (self.take == "pattern") != bool(self.pattern):
            raise ValueError("pattern: goes with take: pattern, and that needs one")
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern: is no regular expression: {error}") from error
        if self.pattern and groups < 1:
            raise ValueError(f"pattern: '{self.pattern}' has no group; put what counts in brackets")


@dataclass
class ExactAnswer:
    """1 or 0 for each attempt."""

    options: ExactAnswerOptions

    def __post_init__(self) -> None:
        self.needs = {self.options.key: (str, int, float, list)}

    def __call__(self, attempts: Sequence[Attempt]) -> list[float]:
        return [float(self._same(attempt)) for attempt in attempts]

    def _same(self, attempt: Attempt) -> bool:
        right = attempt.fields[self.options.key]
        said = self._taken(attempt.text)
        return said is not None and any(
            self._form(said) == self._form(str(one)) for one in (right if isinstance(right, list) else [right])
        )

    def _taken(self, text: str) -> str | None:
        if self.options.take == "whole":
            return text
        if self.options.take == "last_line":
            return (text.strip().splitlines() or [""])[-1]
        pattern = _NUMBER if self.options.take == "last_number" else re.compile(self.options.pattern, re.MULTILINE)
        found = None
        for found in pattern.finditer(text):  # noqa: B007  (the last one counts)
            pass
        return found and (found[1] if pattern.groups else found[0])

    def _form(self, text: str) -> Any:
        text = " ".join((text or "").split())
        if self.options.numbers and len(text) <= LONGEST and _NUMBER.fullmatch(text):
            try:
                return Fraction(text.replace(",", ""))
            except (ValueError, ZeroDivisionError):
                return text
        return text if self.options.case else text.casefold()


def exact_answer(options: ExactAnswerOptions, context: RewardContext) -> Reward:
    """1 where the answer is the one of the prompt's line, else 0; spaces and, unless asked, capitals don't count.

    Source: none; the usual check of GSM8K ("#### 42") and of MATH's boxed answers.
    Use: sums, facts, choices: whatever has one right answer. `take: last_number` for one at the end of reasoning.
    Cost: another spelling of a right answer is wrong; of an answer that lists many numbers the last one counts.
    """
    return ExactAnswer(options)


@hookimpl
def moelab_rewards() -> list[Component[RewardContext, Reward]]:
    return [component("exact_answer", ExactAnswerOptions, exact_answer)]
