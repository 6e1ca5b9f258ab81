"""From one stage of a run to the next, and what is told of them."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from moelab.training.loop import Loop
from moelab.training.setup import Setup
from moelab.training.stages import take_positions

logger = logging.getLogger("moelab")
STAGES = "stages"  # of summary.json


def number_at(setup: Setup, step: int) -> int:
    """Which stage this step is of; 0 where there are none."""
    return max((number for number, stage in enumerate(setup.stages) if stage.first <= step), default=0)


def as_in(setup: Setup, number: int) -> Setup:
    """What the setup says in this stage; the model stays as it is. Without stages it is the setup."""
    if not setup.stages:
        return setup
    stage = setup.stages[number]
    train = stage.config.train
    declared, costs = stage.costs(setup.model)
    micro = train.micro_batch_size or train.batch_size // setup.ranks.size
    return dataclasses.replace(
        setup, stage=number, config=stage.config, batches=stage.batches, validation=stage.validation,
        step_settings=dataclasses.replace(setup.step_settings, micro_batch_size=micro), flops_per_token=declared,
        costs=costs,
    )  # fmt: skip


def enter(setup: Setup, number: int) -> Setup:
    """The setup in this stage, its model too."""
    if setup.stages:
        take_positions(setup.model, setup.stages[number])
    return as_in(setup, number)


def enter_if_due(loop: Loop) -> None:
    """Before a step: on to the stage that it is of."""
    number = number_at(loop.setup, loop.progress.step)
    if number != loop.setup.stage:
        loop.setup = enter(loop.setup, number)
        loop.progress.go_on(loop.setup.costs, loop.setup.flops_per_token)
        logger.info("stage %d of %d: %s", number + 1, len(loop.setup.stages), loop.setup.stages[number].line())


def stage_metrics(setup: Setup) -> dict[str, float]:
    """Of a logged step, so that borders are seen beside what they do; {} without stages."""
    if not setup.stages:
        return {}
    train, model = setup.config.train, setup.config.model
    return {
        "train/stage": setup.stage + 1,
        "train/sequence_length": train.sequence_length,
        "train/rope_theta": model.rope_theta,
    }


def stage_facts(setup: Setup) -> dict[str, Any]:
    """What summary.json has of stages; {} without any."""
    return {STAGES: [stage.facts(setup.model) for stage in setup.stages]} if setup.stages else {}
