"""Stages of a run: parts of its steps that have some keys otherwise, one after the other.

**What one stage says, all say**: so no stage hangs on a default, nor on what another made of it, and the run's own
value of such a key counts nowhere. A config with stages stands as in its last one, which is what the run makes.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

from omegaconf import MISSING

from moelab.config.model import Part
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


def spans(config: Staged) -> list[tuple[int, int]]:
    """(first step, the step after its last) of each stage."""
    ends = list(itertools.accumulate(stage.steps or 0 for stage in config.stages[:-1]))
    return list(itertools.pairwise([0, *ends, config.train.steps])) if config.stages else []


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
        for key in PLACES:
            sayer = next((other for other in stages if key in other.said()), None)
            if sayer is not None and key not in stage.said():
                raise ConfigError(
                    f"{where}.{key}: stage '{sayer.name}' says it, and '{stage.name}' doesn't; what one stage says, "
                    "all say"
                )
    _check_steps(config)
    if config.train.keep_best or config.train.patience is not None:
        key = "keep_best" if config.train.keep_best else "patience"
        raise ConfigError(
            f"train.{key}: compares held-out losses, and each stage has its own, of its own length; leave it out, or "
            "make the last stage a run of its own with train.init_from"
        )


def _check_steps(config: Staged) -> None:
    given, open_end = sum(stage.steps or 0 for stage in config.stages), config.stages[-1].steps is None
    steps = config.train.steps
    if (steps <= given) if open_end else (steps != given):
        rule = "more than" if open_end else "just"
        raise ConfigError(
            f"train.steps: {steps}, and the stages take {given}; give {rule} {given}"
            + ("" if open_end else ", or leave out the steps of the last stage, which then takes what is left")
        )
