"""reasoning-gym's verifiers as a reward: what the library itself says of its own answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moelab import Attempt, ConfigError, DataError, Registry, Reward, RewardContext, testing
from moelab.hookspecs import REWARDS

gym = pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'moelab[rewards]'")
REGISTRY = Registry(entry_points=False, points=[REWARDS])
TASKS = ("basic_arithmetic", "n_queens", "chain_sum", "letter_counting", "spiral_matrix")


def reward(**options: Any) -> Reward:
    return REGISTRY.build(REWARDS, {"name": "reasoning_gym", **options}, RewardContext(), "reward")


def entry(task: str) -> dict[str, Any]:
    return json.loads(json.dumps(gym.create_dataset(task, size=1, seed=1)[0]))  # type: ignore[no-any-return]


def attempt(made: dict[str, Any], text: str) -> Attempt:
    fields = {key: value for key, value in made.items() if key != "question"}
    return Attempt(made["question"], text, fields, "rows.jsonl:1")


@pytest.mark.parametrize("task", TASKS)
def test_a_tasks_own_answer_is_right_and_another_is_not(task: str) -> None:
    made = entry(task)
    right, wrong = reward(allow_code_execution=True)([attempt(made, made["answer"]), attempt(made, "[[")])
    assert right == 1.0 and wrong < 0.5


def test_it_keeps_the_contract_of_rewards() -> None:
    made = entry("chain_sum")
    options = {"allow_code_execution": True, "task": "chain_sum"}
    testing.check_reward(REGISTRY.components(REWARDS)["reasoning_gym"], options, fields=made)


def test_without_leave_or_with_a_task_that_is_none_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"allow_code_execution: is false"):
        reward()
    with pytest.raises(ConfigError, match=r"task: reasoning-gym has no 'chess_mastery'"):
        reward(allow_code_execution=True, task="chess_mastery")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: metadata: has no source_dataset"):
        reward(allow_code_execution=True)([attempt({"question": "q", "answer": "4", "metadata": {}}, "4")])
