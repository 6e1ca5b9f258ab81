"""How long an answer is, against how long it should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moelab import Attempt, Component, Reward, RewardContext, component, hookimpl

UNITS = ("tokens", "characters", "words")


@dataclass
class LengthOptions:
    least: int = 0  # shorter ones lose
    most: int | None = None  # longer ones lose; null: none are too long
    slack: int = 16  # over so many more, or less, the worth falls from 1 to 0
    unit: str = "tokens"  # tokens, characters or words

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit: must be one of {', '.join(UNITS)}, not '{self.unit}'")
        if self.least < 0 or self.slack < 0:
            raise ValueError("least, slack: must be at least 0")
        if self.most is not None and self.most < self.least:
            raise ValueError(f"most: {self.most} is less than least {self.least}")
        if self.most is None and not self.least:
            raise ValueError("least or most: give one; without them all answers are worth the same")


def length(options: LengthOptions, context: RewardContext) -> Reward:
    """1 for answers of `least` to `most` tokens, falling to 0 in a straight line over `slack` tokens outside.

    Source: none; DAPO punishes overlong answers by such a slope (2503.14476, of which the abstract was read).
    Use: beside another reward, against answers that grow because length pleases it.
    Cost: it says nothing of what is said.
    """

    def judge(attempts: Sequence[Attempt]) -> list[float]:
        return [_worth(_measured(attempt)) for attempt in attempts]

    def _measured(attempt: Attempt) -> int:
        if options.unit == "tokens":
            return attempt.tokens
        return len(attempt.text if options.unit == "characters" else attempt.text.split())

    def _worth(size: int) -> float:
        over = max(options.least - size, 0 if options.most is None else size - options.most, 0)
        return max(0.0, 1 - over / (options.slack + 1)) if over else 1.0

    return judge


@hookimpl
def moelab_rewards() -> list[Component[RewardContext, Reward]]:
    return [component("length", LengthOptions, length)]
