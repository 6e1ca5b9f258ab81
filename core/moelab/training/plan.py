"""How long a run is, and what becomes of its learning rate when that changes between two of its steps.

`train.steps` may be another number when a run is resumed. **Where every rate it has taken is the one that a run planned
for the new number takes at that step, it goes on as that run**, bit for bit: `constant` always, `wsd` until its decay
begins, any schedule during its warm-up. That is what the stable stage of WSD is for: from any of its steps one can
train on, or decay and end (MiniCPM, arXiv 2404.06395: its formula, with the end of the stable stage T left open).

Elsewhere the rate has come down for an end that is no end any more. `schedule.rewarm_steps` then raises it, linearly
over so many steps, from where it is to `optimizer.lr`, and the schedule runs once more over the steps that are left:
re-warming and re-decaying (Ibrahim et al., arXiv 2403.08763). `wsd` re-warmed from a decayed checkpoint is close to
WSD-S (Wen et al., "A River Valley Loss Landscape Perspective"). Of these papers the abstracts and accounts of others
were read, not the whole. Departures: the rate rises from where it is and not from zero, the optimizer's moments stay,
and `wsd` decays over `decay_fraction` of the steps that are left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moelab.checkpoint import STATE, checkpoints
from moelab.config.run import ScheduleConfig
from moelab.errors import CheckpointError, ConfigError
from moelab.records import Record
from moelab.safe_files import Reading
from moelab.training.format import REPLANNED
from moelab.training.schedule import learning_rate_factor


@dataclass(frozen=True)
class Change:
    """Of `train.steps`, when a run was resumed."""

    step: int  # steps done then
    planned: int  # train.steps before
    steps: int  # and after
    rewarm_steps: int | None = None  # None: the rates taken were those of the new plan; else over which they rise again
    factor: float = 1.0  # of optimizer.lr: where they rise from

    def sentence(self) -> str:
        """What is told of it."""
        done = f"train.steps: {self.steps}, where {self.planned} were planned, at step {self.step}"
        if self.rewarm_steps is None:
            return f"{done}: the rates so far are those of a run planned for {self.steps} steps, so it goes on as one"
        return (
            f"{done}: the rate had come down to {self.factor:.3g} of optimizer.lr; it rises again over "
            f"{self.rewarm_steps} steps and the schedule runs over the {self.steps - self.step} that are left, which "
            f"is another recipe than {self.steps} steps planned from the start"
        )


@dataclass(frozen=True)
class Plan:
    """The learning rate of a run, from its schedule, its steps, and how these changed."""

    schedule: ScheduleConfig
    steps: int
    changes: tuple[Change, ...] = ()

    @property
    def rewarmed(self) -> tuple[Change, ...]:
        """The changes after which the run was another one than a run planned so."""
        return tuple(change for change in self.changes if change.rewarm_steps is not None)

    def factor(self, step: int) -> float:
        """Factor on `optimizer.lr` at optimizer step `step`, of those since the rate was last raised again."""
        if not self.rewarmed:
            return learning_rate_factor(self.schedule, step, self.steps)
        last = self.rewarmed[-1]
        rise, since = last.rewarm_steps or 0, step - last.step
        if since < rise:
            return last.factor + (1 - last.factor) * (since + 1) / (rise + 1)
        return learning_rate_factor(replace(self.schedule, warmup_steps=rise), since, self.steps - last.step)

    def first_other(self, steps: int, step: int) -> int | None:
        """The first step before `step` whose rate is not that of a run planned for `steps`; None: there is none."""
        begin = self.rewarmed[-1].step if self.rewarmed else 0
        other = replace(self, steps=steps)
        return next((at for at in range(begin, step) if self.factor(at) != other.factor(at)), None)

    def changed(self, steps: int, step: int, checkpoint: Path) -> Plan:
        """The plan of a run that goes on from `checkpoint`, `step` steps done, to `steps` of them.

        Raises ConfigError where these are fewer than it has done, or the schedule doesn't say what they mean.
        """
        if steps == self.steps:
            return self
        if steps < step:
            raise ConfigError(f"train.steps: {steps}, and {checkpoint} has done {step} already; give at least as many")
        other = self.first_other(steps, step)
        if other is None:
            return replace(self, steps=steps, changes=(*self.changes, Change(step, self.steps, steps)))
        rewarm = self.schedule.rewarm_steps
        if rewarm is None or steps < self.steps:
            raise ConfigError(self._refusal(steps, step, other, checkpoint))
        if rewarm >= steps - step:
            raise ConfigError(
                f"schedule.rewarm_steps: {rewarm} leave nothing of the {steps - step} steps from {step} to {steps}"
            )
        change = Change(step, self.steps, steps, rewarm, self.factor(step - 1))
        return replace(self, steps=steps, changes=(*self.changes, change))

    def _refusal(self, steps: int, step: int, other: int, checkpoint: Path) -> str:
        then, now = self.factor(other), replace(self, steps=steps).factor(other)
        ways = [f"train.steps={self.steps} goes on as planned"]
        before = [folder for folder in checkpoints(checkpoint.parent.parent) if _step_of(folder) <= other]
        if before and before[-1] != checkpoint:
            ways.append(f"{before[-1]} is from before: move the later ones away and --resume goes on from it")
        if steps > self.steps:
            ways.append(
                "schedule.rewarm_steps=N raises the rate again over N steps and lets the schedule run over what is "
                "left, which is told as another recipe"
            )
        ways.append(
            "a new run with schedule.name=constant, or wsd before its decay, can be lengthened as often as you like"
        )
        return (
            f"train.steps: {steps}, where {checkpoint} was planned for {self.steps} and has done {step}: schedule "
            f"{self.schedule.name} has taken another rate than a run of {steps} steps since step {other} ({then:.4g} "
            f"of optimizer.lr, not {now:.4g}), so what it learnt is not what that run would have learnt; "
            + "; or ".join(ways)
        )


def plan_of(schedule: ScheduleConfig, steps: int, state: Mapping[str, Any], checkpoint: Path | None) -> Plan:
    """As state.json tells it: of a run of `steps` steps, which the config of the checkpoint says.

    Raises CheckpointError for what is no such history.
    """
    reading = Reading(CheckpointError, "use an earlier checkpoint, or restore it")
    record = Record(str(checkpoint / STATE) if checkpoint else STATE, state, reading)
    found = []
    for number, entry in enumerate(record.listed(REPLANNED, dict, optional=True)):
        change = Record(f"{record.where}: {REPLANNED}.{number}", entry, reading)
        step, planned, after = (change.integer(key, least=0) for key in ("step", "planned", "steps"))
        rewarm, factor = change.integer("rewarm_steps", None, least=0), change.number("factor", least=0.0)
        found.append(Change(step, planned, after, rewarm, factor))
    return Plan(schedule, steps, tuple(found))


def to_json(changes: Sequence[Change]) -> list[dict[str, Any]]:
    """What state.json and summary.json keep."""
    return [asdict(change) for change in changes]


def _step_of(folder: Path) -> int:
    digits = folder.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() else 0
