"""What every observer must do: live through a run, a failed one too, and keep its hands off what it is told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moelab.components import Component
from moelab.errors import RunFailure
from moelab.plugin_faults import PluginPart
from moelab.testing.report import make_options, run_checks
from moelab.train.observers import Observers

METRICS = {"train/loss": 2.0, "train/lm_loss": 1.9, "perf/tokens_per_second": 100.0, "moe/layer_00/dead_fraction": 0.0}
CONFIG = {"model": {"hidden_size": 16, "moe": None}, "train": {"steps": 2}, "optimizer": {"lr": 1e-3}, "seed": 0}
FACTS = {"name": "kit", "parameters": {"total": 10, "active": 8}, "flops_per_token": 1.0, "components": {}}


@dataclass
class ObserverCase:
    """One observer under test."""

    component: Component[Path, object]
    options: Any = None

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)

    def watch(self, folder: Path) -> Observers:
        """A fresh observer of a run in `folder`, as the trainer takes it up."""
        observers = Observers()
        part = PluginPart("observer", self.component.name, self.component.owner)
        observers.add(self.component.build(self.options, folder), part)
        return observers


def has_a_hook(case: ObserverCase) -> None:
    """Methods named on_... that are hooks, with arguments that they have."""
    with TemporaryDirectory() as folder:
        case.watch(Path(folder))


def lives_through_a_run(case: ObserverCase) -> None:
    """Every hook in its order, from the start and from a checkpoint."""
    for step in (0, 1):
        with TemporaryDirectory() as folder:
            observers, hook = _begun(case, Path(folder), step)
            hook.on_log(
                step=step + 1, metrics=dict(METRICS), loads={0: [0.5, 0.5]}, alarms=[], changes=[], backends=["loop"]
            )
            hook.on_evaluate(step=step + 1, metrics={"eval/loss": 2.0}, samples=["def f"])
            for files in hook.on_checkpoint(step=step + 1):
                wrong = [name for name, content in (files or {}).items() if not isinstance(content, bytes)]
                assert not wrong, f"on_checkpoint returned {wrong[0]!r}, which is not bytes"
            hook.on_save(step=step + 1, path=Path(folder) / "checkpoints")
            hook.on_train_end(step=step + 1, summary={"status": "finished", "final": dict(METRICS)}, error=None)
            _still_there(observers)


def lives_through_a_failure(case: ObserverCase) -> None:
    """A run that fails tells its end, also when it had not begun."""
    for begun in (True, False):
        with TemporaryDirectory() as folder:
            observers, hook = _begun(case, Path(folder), 0) if begun else _not_begun(case, Path(folder))
            hook.on_train_end(step=0, summary={"status": "failed", "final": {}}, error=RunFailure("a NaN"))
            _still_there(observers)


def changes_nothing_that_it_is_told(case: ObserverCase) -> None:
    """The next observer, and the run, read the same numbers."""
    with TemporaryDirectory() as folder:
        _, hook = _begun(case, Path(folder), 0)
        told = _logged()
        before = copy.deepcopy(told)
        hook.on_log(step=1, **told)
        hook.on_train_end(step=1, summary={"status": "finished", "final": {}}, error=None)
        changed = [key for key, value in told.items() if value != before[key]]
        assert not changed, f"changes the {changed[0]} that it is told"


OBSERVER_CHECKS: tuple[Callable[[ObserverCase], None], ...] = (
    has_a_hook,
    lives_through_a_run,
    lives_through_a_failure,
    changes_nothing_that_it_is_told,
)


def check_observer(component: Component[Path, object], options: Any = None) -> None:
    """Run every check of OBSERVER_CHECKS; raises ConformanceError naming those that fail."""
    run_checks("observer", component, ObserverCase(component, options), OBSERVER_CHECKS)


def _logged() -> dict[str, Any]:
    return {"metrics": dict(METRICS), "loads": {0: [0.5, 0.5]}, "alarms": [], "changes": [], "backends": ["loop"]}


def _not_begun(case: ObserverCase, folder: Path) -> tuple[Observers, Any]:
    observers = case.watch(folder)
    return observers, observers.hook


def _begun(case: ObserverCase, folder: Path, step: int) -> tuple[Observers, Any]:
    observers, hook = _not_begun(case, folder)
    checkpoint = folder / "checkpoints" / f"step_{step:08d}" if step else None
    if checkpoint is not None:
        checkpoint.mkdir(parents=True)
    hook.on_train_begin(
        run_dir=folder, config=copy.deepcopy(CONFIG), facts=copy.deepcopy(FACTS), step=step, checkpoint=checkpoint
    )
    _still_there(observers)
    return observers, hook


def _still_there(observers: Observers) -> None:
    for dropped in observers.dropped:
        raise AssertionError(f"raised {dropped['error']} in {dropped['hook']} ({dropped['at']}), and would be dropped")
