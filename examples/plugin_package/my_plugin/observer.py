"""An observer: keeps the best evaluation so far in best.json, across resumptions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moelab

FILE = "best.json"


@dataclass
class Options:
    metric: str = "eval/loss"  # of an evaluation; the lower, the better


class MyObserver:
    """The step with the lowest value of a metric, in best.json.

    A hook is a method with the name of one in `moelab.hookspecs.RunHooks`; it names the arguments that it wants.
    """

    def __init__(self, options: Options, run_dir: Path) -> None:
        self.metric, self.run_dir = options.metric, run_dir
        self.best: dict[str, Any] = {}

    def on_train_begin(self, run_dir: Path, checkpoint: Path | None) -> None:
        self.run_dir = run_dir
        if checkpoint is not None and (checkpoint / FILE).is_file():  # the run goes on: from what was known there
            self.best = json.loads((checkpoint / FILE).read_text())

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self.metric)
        if value is not None and (not self.best or value < self.best["value"]):
            self.best = {"step": step, "metric": self.metric, "value": value}
            (self.run_dir / FILE).write_text(json.dumps(self.best) + "\n")

    def on_checkpoint(self, step: int) -> dict[str, bytes]:
        return {FILE: json.dumps(self.best).encode()}


@moelab.hookimpl
def moelab_observers() -> list[moelab.Component]:
    return [moelab.component("my_observer", Options, MyObserver)]
