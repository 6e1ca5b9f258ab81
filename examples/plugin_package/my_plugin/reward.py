"""A reward: answers that say please are worth more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import moelab


@dataclass
class Options:
    word: str = "please"


def my_reward(options: Options, context: moelab.RewardContext) -> moelab.Reward:
    """A function of attempts: a number for each."""

    def judge(attempts: Sequence[moelab.Attempt]) -> list[float]:
        return [float(options.word in attempt.text) for attempt in attempts]

    return judge


@moelab.hookimpl
def moelab_rewards() -> list[moelab.Component]:
    return [moelab.component("my_reward", Options, my_reward)]
