"""What one run carries from step to step; the trainer's parts (logged, held_out, saving) read and change it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from moelab.alarms import AlarmChange, AlarmWatch
from moelab.training.best import Best
from moelab.training.interruption import Interruption
from moelab.training.observers import Observers
from moelab.training.plan import Plan
from moelab.training.progress import Progress
from moelab.training.reading import Reading
from moelab.training.run_folder import MetricsLog
from moelab.training.run_lock import RunLock
from moelab.training.save_clock import SaveClock
from moelab.training.setup import Setup
from moelab.training.step import Update
from moelab.training.summary import backends
from moelab.training.writing import Staging, Writing
from moelab.ways import Ways


@dataclass(frozen=True)
class Saving:
    """A checkpoint under way, and what follows when it is in its place."""

    writing: Writing
    then: Callable[[], None]


@dataclass
class Loop:
    """What one run carries from step to step."""

    setup: Setup
    run_dir: Path
    lock: RunLock
    observers: Observers
    metrics: MetricsLog
    progress: Progress
    alarms: AlarmWatch
    plan: Plan
    best: Best
    loads: dict[str, list[float]] = field(default_factory=dict)  # layer -> shares of the last logged step
    backends: list[str] = field(default_factory=list)  # that served so far
    samples: list[str] = field(default_factory=list)  # of the last evaluation
    changes: list[AlarmChange] = field(default_factory=list)  # of alarms, that no log has shown yet
    resumed: Path | None = None  # the checkpoint that the run goes on from
    saved: int | None = None  # the step of the last checkpoint, or of the start: nothing is lost since
    saving: Saving | None = None  # the checkpoint that is written in the background
    staging: Staging = field(default_factory=Staging)
    update: Update = field(default_factory=Update)
    clock: SaveClock = field(default_factory=SaveClock)
    ways: Ways | None = None  # by which its steps are computed, where they were measured
    interruption: Interruption = field(default_factory=Interruption)
    agreed: bool = False  # all processes of the run end at this step together
    ended_early: bool = False  # train.patience is over
    reading: Reading = field(default_factory=Reading)
    too_much: bool | None = None  # what was taken, of what train.memory_budget allows; None: not told yet
    told_compiled: str = ""  # the last line about what was compiled
    damaged: set[str] = field(default_factory=set)  # names of checkpoints that were passed over


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def evaluation_due(setup: Setup, step: int) -> bool:
    """Whether held-out text is read after this step: as the config says, and where a stage ends before the run does."""
    return due(step, setup.config.evaluation.every) or step == setup.end < setup.config.train.steps


def served_backends(loop: Loop) -> list[str]:
    """Those that served this process and, as its checkpoint says, those before it."""
    return sorted({*loop.backends, *backends(loop.setup)})
