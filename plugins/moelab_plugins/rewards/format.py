"""Whether an answer has the form that was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from moelab import Attempt, Component, Reward, RewardContext, component, hookimpl


@dataclass
class FormatOptions:
    contains: list[str] = field(default_factory=list)  # regular expressions that must be found, ^ and $ at lines
    lacks: list[str] = field(default_factory=list)  # those that must not be
    json: bool = False  # the answer, less a fence around it, must be JSON
    ended: bool = False  # the policy must have ended it itself

    def __post_init__(self) -> None:
        for key in ("contains", "lacks"):
            for pattern in getattr(self, key):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{key}: '{pattern}' is no regular expression: {error}") from error
        if not (self.contains or self.lacks or self.json or self.ended):
            raise ValueError("contains, lacks, json or ended: give one; without a rule all answers are worth the same")


def format_rules(options: FormatOptions, context: RewardContext) -> Reward:
    """The share of the rules that an answer keeps: what it must contain and must lack, JSON, an end of its own.

    Source: none. `contains: ["<think>[^<]*</think>"]` asks for reasoning between tags.
    Use: beside a reward of the content, with a small weight, so that answers can be read by a program.
    Cost: an empty answer may keep all rules that forbid; a slow regular expression is slow on every answer.
    """
    contains = [re.compile(pattern, re.MULTILINE) for pattern in options.contains]
    lacks = [re.compile(pattern, re.MULTILINE) for pattern in options.lacks]

    def judge(attempts: Sequence[Attempt]) -> list[float]:
        return [_share(attempt) for attempt in attempts]

    def _share(attempt: Attempt) -> float:
        kept = [bool(pattern.search(attempt.text)) for pattern in contains]
        kept += [not pattern.search(attempt.text) for pattern in lacks]
        kept += [_is_json(attempt.text)] if options.json else []
        kept += [attempt.ended] if options.ended else []
        return sum(kept) / len(kept)

    return judge


def _is_json(text: str) -> bool:
    fenced = re.fullmatch(r"\s*```(?:json)?\n(.*?)\n?```\s*", text, re.DOTALL)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


@hookimpl
def moelab_rewards() -> list[Component[RewardContext, Reward]]:
    return [component("format", FormatOptions, format_rules)]
