"""The rewards of a config and their weighted sum; what is told of one that breaks its promise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moelab.data.rewards import Attempt, Reward, RewardContext, needs_of, reward_fault
from moelab.errors import ConfigError, DataError, RunFailure
from moelab.hookspecs import REWARDS
from moelab.plugin_faults import PluginPart
from moelab.registry import Registry
from moelab.safe_files import kind_of

WEIGHT = "weight"  # of a part among several: the one key that is not its own
_KINDS: dict[type, str] = {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Weighed:
    """A reward of a config, ready."""

    name: str
    weight: float
    apply: Reward
    part: PluginPart

    def check(self, where: str, fields: Mapping[str, Any]) -> None:
        """Raise DataError where a prompt's line lacks what this reward reads."""
        for key, kinds in needs_of(self.apply).items():
            if key not in fields:
                raise DataError(f"{where}: has no {key}, which reward '{self.name}' reads; give it")
            value = fields[key]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                wanted = " or ".join(_KINDS.get(kind, kind.__name__) for kind in kinds)
                raise DataError(f"{where}: {key}: must be {wanted}, not {kind_of(value)}, for reward '{self.name}'")

    def judge(self, attempts: Sequence[Attempt]) -> list[float]:
        """Unweighted. Raises ConfigError for a stranger's mistake, RunFailure for what is no finite number."""
        with self.part.blamed():
            answer = self.apply(attempts)
        fault = reward_fault(answer, len(attempts))
        if fault is not None:
            raise self.part.fault(fault, self.apply)
        values = [float(value) for value in answer]
        for value, attempt in zip(values, attempts, strict=True):
            if not math.isfinite(value):
                said = f"is {value} for an answer to {attempt.where}; mend the reward"
                raise RunFailure(f"{self.part.where}: {self.part.title}: {said}")
        return values


@dataclass(frozen=True)
class Judge:
    """The sum of rewards, each times its weight."""

    rewards: Sequence[Weighed]

    def check(self, where: str, fields: Mapping[str, Any]) -> None:
        """Raise DataError where a prompt's line lacks what a reward reads."""
        for reward in self.rewards:
            reward.check(where, fields)

    def __call__(self, attempts: Sequence[Attempt]) -> tuple[list[float], dict[str, list[float]]]:
        """What each attempt is worth, and by which reward how much, unweighted."""
        found = {reward.name: reward.judge(attempts) for reward in self.rewards}
        total = [
            sum(reward.weight * found[reward.name][index] for reward in self.rewards) for index in range(len(attempts))
        ]
        return total, found


def resolve_rewards(said: Any, registry: Registry, where: str) -> list[dict[str, Any]]:
    """One part or a list of them, with every default written out. Raises ConfigError for what can't be."""
    nodes = said if isinstance(said, list) else [said]
    if not nodes:
        raise ConfigError(f"{where}: is empty, and nothing says what an answer is worth")
    found: list[dict[str, Any]] = []
    for place, node in _places(nodes, where):
        own = {key: value for key, value in node.items() if key != WEIGHT}
        weight = _weight(node.get(WEIGHT, 1.0), f"{place}.{WEIGHT}")
        resolved = registry.resolve(REWARDS, own, place)
        if any(resolved["name"] == other["name"] for other in found):
            raise ConfigError(f"{place}.name: '{resolved['name']}' is there already; give it once")
        found.append(resolved | {WEIGHT: weight})
    return found


def build_judge(said: Any, registry: Registry, context: RewardContext) -> Judge:
    """Of one part or a list of them. Raises ConfigError, CheckpointError or DataError for what can't be built."""
    nodes = said if isinstance(said, list) else [said]
    built = []
    for place, node in _places(nodes, context.where):
        own = {key: value for key, value in node.items() if key != WEIGHT}
        told = replace(context, where=place, registry=registry)
        apply = registry.build(REWARDS, own, told, place)
        weight = _weight(node.get(WEIGHT, 1.0), f"{place}.{WEIGHT}")
        built.append(Weighed(own["name"], weight, apply, registry.part(REWARDS, own, place)))
    return Judge(built)


def _places(nodes: list[Any], where: str) -> list[tuple[str, Any]]:
    return [(f"{where}.{number}" if len(nodes) > 1 else where, node) for number, node in enumerate(nodes)]


def _weight(said: Any, where: str) -> float:
    try:
        weight = math.nan if isinstance(said, bool) else float(said)
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight):
        raise ConfigError(f"{where}: must be a number, not '{said}'")
    return weight
