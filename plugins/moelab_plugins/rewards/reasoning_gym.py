"""reasoning-gym's verifiers as a reward. `pip install 'moelab[rewards]'`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from moelab import Attempt, Component, ConfigError, DataError, Reward, RewardContext, component, hookimpl
from moelab.plugin_faults import quoted

NEEDS: Mapping[str, tuple[type, ...]] = {"answer": (str,), "metadata": (dict,)}


@dataclass
class ReasoningGymOptions:
    # Nothing is verified without it: some verifiers hand what the model wrote to Python's eval, in moelab's process.
    allow_code_execution: bool = False
    task: str = ""  # as reasoning-gym calls it, basic_arithmetic; "": metadata.source_dataset of each prompt's line

    def __post_init__(self) -> None:
        if not self.allow_code_execution:
            raise ValueError(
                "allow_code_execution: is false, and some of reasoning-gym's verifiers hand what the model wrote to "
                "Python's eval, in moelab's own process; set it to true in a container with nothing to lose"
            )


@dataclass
class Verifier:
    """What the task's own `score_answer` says of each attempt."""

    scorer: Callable[[str], Callable[..., float]]
    task: str

    def __post_init__(self) -> None:
        self.needs = dict(NEEDS)

    def __call__(self, attempts: Sequence[Attempt]) -> list[float]:
        return [self._worth(attempt) for attempt in attempts]

    def _worth(self, attempt: Attempt) -> float:
        entry = {"question": attempt.prompt} | dict(attempt.fields)
        task = self.task or entry["metadata"].get("source_dataset")
        if not isinstance(task, str):
            raise DataError(f"{attempt.where}: metadata: has no source_dataset; give it, or the reward a task")
        try:
            score = self.scorer(task)
        except ValueError as error:
            raise DataError(f"{attempt.where}: reasoning-gym has no task '{task}': {quoted(error)}") from error
        try:
            return float(score(attempt.text.strip(), entry))
        except Exception:  # of an answer that its author did not think of
            return 0.0


def reasoning_gym(options: ReasoningGymOptions, context: RewardContext) -> Reward:
    """What the verifier of a reasoning-gym task says of the answer, 0 to 1.

    Lines are its entries, `question` as `prompt`. An answer that makes a verifier raise is worth 0.

    Source: reasoning-gym 0.1.25, `get_score_answer_fn`, read.
    Use: some hundred kinds of puzzles that are made by a program and judged by one.
    Cost: several verifiers (n_queens, spiral_matrix, number_sorting, ...) give the model's text to Python's eval, in
    moelab's own process, without a limit: hence allow_code_execution.
    """
    try:
        module: Any = import_module("reasoning_gym")
    except ImportError as error:
        missing = f" ({error})" if error.name != "reasoning_gym" else ""
        raise ConfigError(f"needs reasoning-gym{missing}: pip install 'moelab[rewards]'") from error
    if options.task:
        try:
            module.get_score_answer_fn(options.task)
        except ValueError as error:
            raise ConfigError(f"task: reasoning-gym has no '{options.task}': {quoted(error)}") from error
    return Verifier(module.get_score_answer_fn, options.task)


@hookimpl
def moelab_rewards() -> list[Component[RewardContext, Reward]]:
    return [component("reasoning_gym", ReasoningGymOptions, reasoning_gym)]
