"""Files of answers and a reward -> a folder of training data, in place whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.alignment.judge import build_judge, resolve_rewards
from moelab.atomic import check_place
from moelab.config.text import read_tree
from moelab.data.rewards import RewardContext
from moelab.errors import ConfigError
from moelab.hookspecs import REWARDS
from moelab.registry import Registry
from moelab_tools.synthesis.answers import read_answers
from moelab_tools.synthesis.folder import write_folder
from moelab_tools.synthesis.rejection import Made, Rule, as_files, sort_out

OPTION = "--reward"


@dataclass(frozen=True)
class Asking:
    """What is judged, and by what."""

    answers: Sequence[Path]
    reward: str  # a name, or the part, or a list, as text
    plugins: Sequence[str] = ()


def synthesise(asking: Asking, rule: Rule, out: Path) -> Made:
    """Write sft.jsonl, pairs.jsonl and synthesis.json into a folder that is not there yet.

    Raises ConfigError for a reward that can't be or a folder that exists, DataError for what is no answer.
    """
    if rule.wrong is not None and rule.wrong >= rule.right:
        raise ConfigError(f"--wrong: {rule.wrong} is not below --right, {rule.right}")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out}: exists already, and nothing is overwritten; take another name, or move it away")
    check_place(out, "--out")
    registry = Registry(asking.plugins, points=[REWARDS])
    rewards = resolve_rewards(_parts(asking.reward), registry, OPTION)
    judge = build_judge(rewards, registry, RewardContext(where=OPTION))
    asked = read_answers(asking.answers)
    for one in asked:
        for attempt in one.attempts:
            judge.check(attempt.where, attempt.fields)
    source = {"step": "rejection_sampling", "reward": rewards}
    made = sort_out(asked, judge, rule, source)
    write_folder(out, as_files(made, source))
    return made


def _parts(said: str) -> list[Any]:
    """A name, a part or a list of parts, as text -> a list of parts."""
    tree = read_tree(said, OPTION)
    nodes = tree if isinstance(tree, list) else [tree]
    parts = [{"name": str(node)} if isinstance(node, str) else node for node in nodes]
    if not all(isinstance(part, Mapping) for part in parts):
        raise ConfigError(f"{OPTION}: must be a name, {{name: ..., options}} or a list of these, not '{said}'")
    return parts
