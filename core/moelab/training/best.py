"""The lowest held-out loss of a run: which evaluation had it, and whether waiting for a lower one is over.

Both uses are off unless asked for. `train.keep_best` keeps the checkpoint of that evaluation in RUN/best beside the
newest ones. `train.patience` ends a run after so many evaluations without a lower loss, its rate then not brought down
(Prechelt 1998, "Early Stopping - but when?", criterion UP_s in the form that Keras and Lightning call patience; the
chapter was not opened). In a run of stages both count from the stage's beginning, and patience ends the last one
alone. The lowest of many looks at one text is too low by chance: `moelab compare` goes by the last
evaluation unless asked otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moelab.atomic import discard
from moelab.checkpoint import STATE, read_state
from moelab.errors import CheckpointError
from moelab.records import Record
from moelab.safe_files import Reading
from moelab.training.format import BEST_EVALUATION

logger = logging.getLogger("moelab")
READING = Reading(CheckpointError, "use an earlier checkpoint, or restore it")


@dataclass
class Best:
    """Of the evaluations so far, without that of random weights."""

    step: int | None = None  # where the loss was lowest; None: not evaluated yet
    loss: float | None = None  # nats a token
    evaluations: int = 0  # that were looked at
    since: int = 0  # of these, in a row and without a lower loss
    last: int = -1  # step of the last one: one that is made again counts once

    @classmethod
    def of(cls, state: Mapping[str, Any], checkpoint: Path | None) -> Best:
        """As state.json has it. Raises CheckpointError for what is none."""
        where = str(checkpoint / STATE) if checkpoint else STATE
        record = Record(where, state, READING)
        found = record.record(BEST_EVALUATION, optional=True)
        step, loss = found.integer("step", None, least=0), found.number("loss", None)
        evaluations, since = (found.integer(key, 0, least=0) for key in ("evaluations", "since"))
        return cls(step, loss, evaluations, since, found.integer("last", -1))

    def look(self, step: int, loss: float) -> bool:
        """Take an evaluation's loss; -> whether it is the lowest so far. A loss that is NaN is not."""
        if step <= self.last:
            return False
        self.last, self.evaluations = step, self.evaluations + 1
        if self.loss is None or loss < self.loss:
            self.step, self.loss, self.since = step, loss, 0
            return True
        self.since += 1
        return False

    def of_stage(self, first: int) -> Best:
        """As a stage that begins after step `first` has it: losses of another stage's length don't compare."""
        if first == 0 or self.step is None or self.step > first:
            return self
        return Best(evaluations=self.evaluations, last=self.last)

    def over(self, patience: int | None) -> bool:
        """Whether a run of this patience waits no longer."""
        return patience is not None and self.since >= patience

    def sentence(self, patience: int | None, step: int, planned: int) -> str:
        """What is told where it is over."""
        return (
            f"ended early at step {step} of {planned}: no lower held-out loss in {self.since} evaluations in a row "
            f"since step {self.step} (train.patience={patience})"
        )

    def to_json(self) -> dict[str, Any]:
        """What state.json and summary.json keep."""
        return asdict(self)


def with_folder(best: Best, folder: Path, step: int, *, replanned: bool) -> Best:
    """`best` of a run that goes on from `step`, where `folder` holds the checkpoint that is kept as the best.

    One from after `step` comes again on the way, unless the run was `replanned` and goes another one. Where the two
    don't belong together the folder goes and the search begins again, which is told.
    """
    try:
        there = _step_of(folder)
    except CheckpointError as error:  # no reason not to go on: the next best takes its place
        logger.warning("%s; the best is looked for from step %d on", error, step)
        return Best(evaluations=best.evaluations, last=best.last)
    if there == best.step or (there is not None and there > step and not replanned):
        return best
    if there is not None:
        discard(folder)
    held = "no checkpoint" if there is None else f"that of step {there}"
    logger.warning(
        "%s held %s, and the lowest held-out loss before step %d was at step %s: the best is looked for from here on",
        folder, held, step, best.step,
    )  # fmt: skip
    return Best(evaluations=best.evaluations, last=best.last)


def _step_of(folder: Path) -> int | None:
    """None where there is no such folder. Raises CheckpointError for one that can't be read."""
    if not folder.is_dir():
        return None
    return Record(str(folder / STATE), read_state(folder), READING).integer("step", least=0)
