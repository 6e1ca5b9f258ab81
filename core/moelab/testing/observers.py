"""What every observer must do: live through a run, a resumed and a failed one too, and change nothing it is told.

The hooks come as the trainer calls them: an evaluation before the first step, a look at the probe, a log with an alarm,
a number that is not finite, a checkpoint; then the same from that checkpoint, as another process would.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moelab.alarms import Alarm, AlarmChange
from moelab.components import Component
from moelab.errors import RunFailure
from moelab.moe.probe import Probe
from moelab.moe.routing import LayerRecord, Routing
from moelab.plugin_faults import PluginPart
from moelab.testing.report import make_options, run_checks
from moelab.training.observers import Observers
from moelab.training.run_folder import METRICS as LOG

CONFIG = {"model": {"hidden_size": 16, "moe": None}, "train": {"steps": 2}, "optimizer": {"lr": 1e-3}, "seed": 0}
FACTS = {"name": "kit", "parameters": {"total": 10, "active": 8}, "flops_per_token": 1.0, "components": {}}
NUMBERS = {"train/loss": 2.0, "train/lm_loss": 1.9, "perf/tokens_per_second": 100.0, "moe/layer_00/dead_fraction": 0.0}
HELD_OUT = {"eval/loss": 2.0, "eval/bits_per_byte": 2.9}
NOT_FINITE = Alarm("not_finite", None, float("inf"), 0.0, "look at optimizer.lr")
SAMPLE = "def f():\n\treturn '\x1b[1m'"  # a model may generate anything


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


class _Run:
    """The trainer's part: what it tells, in its order. `told` holds all of that, to be compared afterwards."""

    def __init__(self, case: ObserverCase, folder: Path, checkpoint: Path | None = None) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self.observers = case.watch(folder)
        self.told: list[tuple[str, dict[str, Any], dict[str, Any]]] = []  # hook, arguments, a copy from before

    def tell(self, hook: str, **arguments: Any) -> list[Any]:
        self.told.append((hook, arguments, copy.deepcopy(arguments)))
        answers: list[Any] = getattr(self.observers.hook, hook)(**arguments)
        for dropped in self.observers.dropped:
            said = f"raised {dropped['error']} in {dropped['hook']} ({dropped['at']})"
            raise AssertionError(f"{said}, and would be dropped")
        return answers

    def begin(self, step: int = 0) -> None:
        config, facts = copy.deepcopy(CONFIG), copy.deepcopy(FACTS)
        self.tell("on_train_begin", run_dir=self.folder, config=config, facts=facts, step=step,
                  checkpoint=self.checkpoint)  # fmt: skip
        if step == 0:
            self._evaluate(0)
            self._probe(0)

    def step(self, step: int) -> Path:
        """One step with all that can come with it; -> its checkpoint."""
        numbers = NUMBERS | {"train/grad_norm": float("inf")}
        changes = [AlarmChange(step, "begins", NOT_FINITE)]
        found = self._probe(step)
        self._write(step, found | numbers)
        self.tell("on_log", step=step, metrics=found | numbers, loads={0: [0.5, 0.5]}, alarms=[NOT_FINITE],
                  changes=changes, backends=["loop"])  # fmt: skip
        self._evaluate(step)
        path = self.folder / "checkpoints" / f"step_{step:08d}"
        path.mkdir(parents=True)
        for files in self.tell("on_checkpoint", step=step):
            for name, content in (files or {}).items():
                (path / name).write_bytes(content)
        self.tell("on_save", step=step, path=path)
        return path

    def end(self, step: int, error: BaseException | None = None) -> None:
        status = "finished" if error is None else "failed"
        self.tell("on_train_end", step=step, summary={"status": status, "final": dict(NUMBERS)}, error=error)

    def _evaluate(self, step: int) -> None:
        self._write(step, HELD_OUT)
        self.tell("on_evaluate", step=step, metrics=dict(HELD_OUT), samples=[SAMPLE] if step else [])

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        """As the trainer: into metrics.jsonl first."""
        with (self.folder / LOG).open("a") as log:
            log.write(json.dumps({"step": step, "tokens": 64 * step, **numbers}) + "\n")

    def _probe(self, step: int) -> dict[str, float]:
        found = self.tell("on_probe", step=step, probe=_probe()) if self.observers.listens("on_probe") else []
        return {tag: float(value) for numbers in found if numbers for tag, value in numbers.items()}


def has_a_hook(case: ObserverCase) -> None:
    """Methods named on_... that are hooks, with arguments that they have."""
    with TemporaryDirectory() as folder:
        case.watch(Path(folder))


def lives_through_a_run(case: ObserverCase) -> None:
    """Every hook in its order."""
    with TemporaryDirectory() as folder:
        run = _Run(case, Path(folder))
        run.begin()
        run.step(1)
        run.step(2)
        run.end(2)


def goes_on_from_a_checkpoint(case: ObserverCase) -> None:
    """A new process goes on from what `on_checkpoint` gave, or from a checkpoint of before it was in the config."""
    for known in (True, False):
        with TemporaryDirectory() as folder:
            first = _Run(case, Path(folder))
            first.begin()
            checkpoint = first.step(1)
            for file in [] if known else checkpoint.iterdir():
                file.unlink()
            second = _Run(case, Path(folder), checkpoint)
            second.begin(1)
            second.step(2)
            second.end(2)


def lives_through_a_failure(case: ObserverCase) -> None:
    """A run that fails tells its end, also when it had not begun."""
    for begun in (True, False):
        with TemporaryDirectory() as folder:
            run = _Run(case, Path(folder))
            if begun:
                run.begin()
            run.end(0, RunFailure("a NaN"))


def changes_nothing_that_it_is_told(case: ObserverCase) -> None:
    """The next observer, and the run, read the same."""
    with TemporaryDirectory() as folder:
        run = _Run(case, Path(folder))
        run.begin()
        run.step(1)
        run.end(1)
        for hook, arguments, before in run.told:
            changed = [key for key, value in arguments.items() if key != "probe" and value != before[key]]
            assert not changed, f"changes the {changed[0]} that {hook} is told"


OBSERVER_CHECKS: tuple[Callable[[ObserverCase], None], ...] = (
    has_a_hook,
    lives_through_a_run,
    goes_on_from_a_checkpoint,
    lives_through_a_failure,
    changes_nothing_that_it_is_told,
)


def check_observer(component: Component[Path, object], options: Any = None) -> None:
    """Run every check of OBSERVER_CHECKS; raises ConformanceError naming those that fail."""
    run_checks("observer", component, ObserverCase(component, options), OBSERVER_CHECKS)


def _probe() -> Probe:
    """Four tokens of two domains through a layer of two experts of width 3, D = 4."""
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])
    weight, expert = scores.topk(1)
    routing = Routing.from_topk(expert, weight, 2, scores=scores, logits=scores.log())
    generator = torch.Generator().manual_seed(0)
    record = LayerRecord(
        0, routing, routing.counts(), router_weight=torch.randn(2, 4, generator=generator),
        gate_up=torch.randn(2, 6, 4, generator=generator), down=torch.randn(2, 3, 4, generator=generator),
        routed_norm=torch.ones(4), shared_norm=torch.ones(4),
    )  # fmt: skip
    return Probe([record], torch.tensor([5, 6, 7, 5]), torch.tensor([0, 0, 1, 1]), ["code", "text"])
