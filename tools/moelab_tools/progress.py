"""What one sees while a run trains: a bar, the newest numbers, and at the end where everything lies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from moelab.printable import printable, ranges
from moelab_tools.terminal import make_console

PARAMETER_UNIT = 1e6
LONGEST_NAME = 60  # characters before the bar
LINES = 10  # about so many lines are printed where no bar can be drawn, as in a log


def _in_a_notebook(console: Console) -> bool:
    """Whether rich can draw there: in Jupyter it needs ipywidgets, and without them lines are printed, as in a log."""
    return console.is_jupyter and find_spec("ipywidgets") is not None


class TrainingProgress:
    """An observer for the terminal, and for notebooks."""

    def __init__(self, steps: int) -> None:
        self.console = make_console()
        self._steps = steps
        self._run_dir = Path()
        self._printed = 0
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            disable=not (self.console.is_terminal or _in_a_notebook(self.console)),
        )
        self._task: TaskID | None = None

    def on_train_begin(self, run_dir: Path, facts: Mapping[str, Any], step: int) -> None:
        parameters, parts = facts["parameters"], facts["components"]
        described = ", ".join(f"{key} {value}" for key, value in parts.items()) or "dense"
        self._run_dir = run_dir
        self.console.print(
            f"[bold]{escape(facts['name'])}[/bold]: {parameters['total'] / PARAMETER_UNIT:.2f} M parameters, "
            f"{parameters['active'] / PARAMETER_UNIT:.2f} M active{' as declared' if parts else ''}; "
            f"{escape(described)}; {facts['device']}, {facts['dtype']}, {facts['threads']} threads",
            highlight=False,
            soft_wrap=not self.console.is_terminal,
        )
        if step:
            self.console.print(f"resumed at step {step}")
        self._bar.start()
        name = printable(facts["name"], LONGEST_NAME)  # the bar is drawn past the console's hook
        self._task = self._bar.add_task(name, total=self._steps, completed=step, numbers="")

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        numbers = f"loss {metrics['train/loss']:.4f}"
        if "train/stage" in metrics:
            numbers = f"stage {metrics['train/stage']:g}  {numbers}"
        if "perf/tokens_per_second" in metrics:
            numbers += f"  {metrics['perf/tokens_per_second']:,.0f} tokens/s"
        if self._task is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        if self._bar.disable and step * LINES // self._steps > self._printed:
            self._printed = step * LINES // self._steps
            print(f"  step {step}/{self._steps}  {numbers}", flush=True)

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        parts = [f"{tag.removeprefix('eval/')} {value:.4f}" for tag, value in metrics.items() if tag.count("/") == 1]
        self.console.print(f"  step {step}  held-out: {', '.join(parts)}", highlight=False)

    def on_train_end(self, step: int, summary: Mapping[str, Any], error: BaseException | None) -> None:
        """Alarms were told as warnings when they began; those that never ended are told again."""
        self._bar.stop()
        for told in still_on(summary.get("alarms", [])):
            self.console.print(f"  [yellow]{escape(told)}[/yellow]", highlight=False)
        outcome = "done" if error is None else f"stopped at step {step}"
        self.console.print(f"{outcome}: {escape(str(self._run_dir))}", highlight=False, soft_wrap=True)


def still_on(alarms: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each rule, not for each layer, of the alarms of a summary that had not ended."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for alarm in alarms:
        if alarm["on"]:
            by_name.setdefault(alarm["name"], []).append(alarm)
    lines = []
    for name, same in by_name.items():
        layers = [alarm["layer"] for alarm in same if alarm["layer"] is not None]
        where = f", layer{'s' if len(layers) > 1 else ''} {ranges(layers)}" if layers else ""
        values = sorted({f"{alarm['value']:.3g}": alarm["value"] for alarm in same}.items(), key=lambda item: item[1])
        between = f"{values[0][0]} to {values[-1][0]}" if len(values) > 1 else values[0][0]
        lines.append(f"alarm still on: {name}{where}, since step {min(a['first_step'] for a in same)}, {between}")
    return lines
