"""Stages of a run: parts of its steps that have some keys otherwise, one after the other.

A stage that leaves out what another says has the run's own value, which is written into it when the config is read.
From then on that counts nowhere: a config with stages stands as in its last one, which is what the run makes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

from omegaconf import MISSING

from moelab.config.model import Part
from moelab.config.rope_scaling import PLAIN
from moelab.errors import ConfigError


@dataclass
class StageConfig:
    """What a stage has in place of the run's own; null: the run's own."""

    name: str = MISSING  # as logs call it
    steps: int | None = None  # optimizer steps; null, for the last one alone: all that are left of train.steps
    sequence_length: int | None = None  # of train
    batch_size: int | None = None  # of train
    micro_batch_size: int | None = None  # of train
    rope_theta: float | None = None  # of model
    rope_scaling: Part | None = None  # of model; {name: none} says plain
    max_position_embeddings: int | None = None  # of model
    mixer: Part | None = None  # of data
    lr: float | None = None  # of optimizer

    def said(self) -> dict[str, Any]:
        """{key: value} of what it has otherwise."""
        return {key: value for key in PLACES if (value := getattr(self, key)) is not None}


class Staged(Protocol):
    """A run's config, as far as its stages go."""

    stages: list[StageConfig]
    train: Any
    as_written: dict[tuple[str, ...], str]


StagedT = TypeVar("StagedT", bound=Staged)
PLACES = {  # key of a stage -> the section that it stands in for
    "sequence_length": "train", "batch_size": "train", "micro_batch_size": "train", "rope_theta": "model",
    "rope_scaling": "model", "max_position_embeddings": "model", "mixer": "data", "lr": "optimizer",
}  # fmt: skip
assert set(PLACES) == {field.name for field in fields(StageConfig)} - {"name", "steps"}


def fill_in(config: Staged) -> None:
    """Write into each stage, in place, the run's own value of what it leaves out and another says.

    Raises ConfigError where the run has none, or it must not be stored.
    """
    for key, section in PLACES.items():
        own = getattr(getattr(config, section), key)
        if own is None and key == "rope_scaling":
            own = {"name": PLAIN}
        silent = [number for number, stage in enumerate(config.stages) if key not in stage.said()]
        if not silent or len(silent) == len(config.stages):
            continue
        if own is None:
            raise ConfigError(
                f"stages.{silent[0]}.{key}: another stage says it, and here neither '{config.stages[silent[0]].name}' "
                f"nor {section}.{key} does; say it in each stage"
            )
        if (section, key) in config.as_written:
            raise ConfigError(
                f"{section}.{key}: {config.as_written[section, key]} would be stored in a stage as what it stands for; "
                f"say {key} in each stage, or set store_environment=true to allow that"
            )
        for number in silent:
            setattr(config.stages[number], key, copy.deepcopy(own))


def run_own(said: Any, stored: Any, section: str) -> dict[str, Any]:
    """{key: the run's own value} in a section: what stages leave out, as `said`, is filled in as they are `stored`."""
    if not isinstance(said, list) or not isinstance(stored, list):
        return {}
    pairs = [pair for pair in zip(said, stored, strict=False) if all(isinstance(one, Mapping) for one in pair)]
    keys = [key for key, where in PLACES.items() if where == section]
    return {
        key: there[key] for key in keys for here, there in pairs if here.get(key) is None and there.get(key) is not None
    }


def spans(config: Staged) -> list[tuple[int, int]]:
    """(first step, the step after its last) of each stage."""
    ends = list(itertools.accumulate(stage.steps or 0 for stage in config.stages[:-1]))
    return list(itertools.pairwise([0, *ends, config.train.steps])) if config.stages else []


def planned_tokens(config: Staged) -> int:
    """What all its steps read, padding counted."""
    train = config.train
    each = [
        (end - first) * (stage.batch_size or train.batch_size) * (stage.sequence_length or train.sequence_length)
        for stage, (first, end) in zip(config.stages, spans(config), strict=True)
    ]
    return sum(each) if each else int(train.steps * train.batch_size * train.sequence_length)


def stand_in(config: Staged, number: int) -> None:
    """Give the config the values of this stage, in place."""
    for key, value in config.stages[number].said().items():
        setattr(getattr(config, PLACES[key]), key, copy.deepcopy(value))
        config.as_written.pop((PLACES[key], key), None)


def in_stage(config: StagedT, number: int) -> StagedT:
    """The config as it is within this stage."""
    config = copy.deepcopy(config)
    stand_in(config, number)
    return config


def check_stages(config: Staged) -> None:
    """Raise ConfigError for stages that are none, naming the key."""
    stages = config.stages
    names = [stage.name for stage in stages]
    for number, stage in enumerate(stages):
        where = f"stages.{number}"
        if not stage.name or stage.name in names[:number]:
            raise ConfigError(f"{where}.name: each stage has a name of its own, and '{stage.name}' is none")
        if stage.steps is None and number < len(stages) - 1:
            raise ConfigError(f"{where}.steps: has no value; the last stage alone may take all that are left")
        if stage.steps is not None and stage.steps < 1:
            raise ConfigError(f"{where}.steps: must be at least 1, not {stage.steps}")
    _check_steps(config)


def _check_steps(config: Staged) -> None:
    given, open_end = sum(stage.steps or 0 for stage in config.stages), config.stages[-1].steps is None
    steps = config.train.steps
    if (steps <= given) if open_end else (steps != given):
        rule = "more than" if open_end else "just"
        raise ConfigError(
            f"train.steps: {steps}, and the stages take {given}; give {rule} {given}"
            + ("" if open_end else ", or leave out the steps of the last stage, which then takes what is left")
        )
