"""`lengths` of an experiment: what its runs make of longer texts, their weights as they are, by several ways.

A way is an attention and a rope scaling. At each length every way reads the same text with the weights of the same run,
so that ways are paired over seeds and documents; words are given at the greatest length alone, and hold together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from moelab.errors import ConfigError, near
from moelab_tools.compare.verdict import BETTER, NEGLIGIBLE, NOT_RESOLVED, WORSE
from moelab_tools.lengths.asked import NAME, parse_lengths, ways_of

WORDS = (BETTER, WORSE, NEGLIGIBLE, NOT_RESOLVED)  # that a decision is declared for


@dataclass
class Reaching:
    """What is read, how, and what is then concluded."""

    question: str = MISSING
    moments: dict[str, int] = field(default_factory=dict)  # name -> the step whose checkpoint is read
    ways: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {attention: ..., rope_scaling: ...}
    baseline: str = MISSING  # a way
    at: str = "1x,2x,4x,8x"  # of the length that the moment's stage was trained on
    tokens: int = 65536  # that are read at each length, about
    passkey: int | None = None  # keys hidden at each depth; null: none
    decision: dict[str, str] = field(default_factory=dict)  # verdict -> what is then concluded, of each way

    def check(self) -> None:
        """Raise ConfigError naming the key."""
        if not self.moments:
            raise ConfigError("lengths.moments: names none; write {end: 2000} for the checkpoint of step 2000")
        if len(self.ways) < 2 or self.baseline not in self.ways:
            raise ConfigError(
                f"lengths.baseline: '{self.baseline}' must be one of two or more ways{near(self.baseline, self.ways)} "
                f"They are: {', '.join(self.ways) or 'none'}"
            )
        for name in self.moments:
            if not NAME.fullmatch(name):
                raise ConfigError(
                    f"lengths.moments.{name}: a name is of letters, digits, . + - and single _ between them"
                )
        ways_of(self.ways, "lengths.ways.")
        parse_lengths(self.at, 1)
        if self.tokens < 1 or (self.passkey or 1) < 1:
            raise ConfigError("lengths: tokens and passkey must be at least 1")
        if set(self.decision) != set(WORDS):
            raise ConfigError(
                f"lengths.decision: write what is concluded from each of {', '.join(WORDS)}, before the first run; it "
                f"has {', '.join(self.decision) or 'none'}"
            )
