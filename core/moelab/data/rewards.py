"""What a reward is: it says what answers to prompts are worth. Without torch: a judge of texts needs none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from moelab.paths import Places
from moelab.plugin_faults import article


@dataclass(frozen=True)
class Attempt:
    """One answer to one prompt."""

    prompt: Any  # as the file has it: a text, or messages
    text: str  # the answer, without the token that ended it
    fields: Mapping[str, Any]  # the other keys of the prompt's line: answer, tests, ...
    where: str  # path:line of the prompt
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # [n] int32: prompt and answer
    tokens: int = 0  # of the answer
    ended: bool = True  # by the policy itself, not by max_new_tokens


@dataclass(frozen=True)
class RewardContext:
    """What a reward is told beside its options."""

    places: Places = field(default_factory=Places)  # where files that the options name are looked for
    where: str = "reward"  # its place in the config, for messages
    device: Any = "cpu"  # torch's, for what computes
    pad_id: int = 0
    registry: Any = None  # the run's moelab.Registry, for what loads a model
    tokenizer: Any = None  # moelab's, whose tokens `Attempt.ids` are; None: nobody knows


class Reward(Protocol):
    """What each attempt is worth: finite numbers, more is better, by the attempt alone, in whatever company.

    One that reads keys of the prompt's line has an attribute `needs`, {key: its types}: lines without are told of
    before anything is sampled.
    """

    def __call__(self, attempts: Sequence[Attempt]) -> Sequence[float]: ...


def needs_of(apply: Reward) -> dict[str, tuple[type, ...]]:
    """Keys of a prompt's line that the reward reads, and of which types."""
    return dict(getattr(apply, "needs", {}))


def reward_fault(answer: object, count: int) -> str | None:
    """A phrase for `PluginPart.fault`, or None; that numbers are finite is not looked at."""
    if isinstance(answer, str | Mapping) or not isinstance(answer, Sequence | np.ndarray):
        return f"returned {article(answer)}; it must return a list of {count} numbers, one for each attempt"
    if len(answer) != count:
        return f"returned {len(answer)} numbers for {count} attempts"
    for value in answer:
        if isinstance(value, str) or not hasattr(value, "__float__"):
            return f"returned {article(value)} among its numbers"
    return None
