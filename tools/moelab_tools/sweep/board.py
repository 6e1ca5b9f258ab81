"""Where each run of a sweep is: bars in a terminal, a line for each begin and end where there is none."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from moelab.errors import UserError
from moelab.safe_files import Reading, an_object, parse_json

TAIL_BYTES = 8192  # of a metrics.jsonl: its last line is within
COLOURS = {"finished": "green", "already finished": "green", "failed": "bold red", "not started": "yellow"}


class Board:
    """A context in which the terminal has the bars."""

    def __init__(self, console: Console, count: int) -> None:
        self.console, self._count, self._ended = console, count, 0
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._bars: dict[str, tuple[TaskID, Path | None]] = {}

    def __enter__(self) -> Board:
        self._progress.start()
        self._all = self._progress.add_task("all", total=self._count, numbers="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def begin(self, name: str, metrics: Path | None, steps: int) -> None:
        self._bars[name] = (self._progress.add_task(name, total=steps or None, numbers=""), metrics)
        if not self.console.is_terminal:
            self.say(f"{name}: starts")

    def look(self, name: str) -> None:
        """Move a run's bar to what its metrics say."""
        bar, metrics = self._bars[name]
        if self.console.is_terminal and metrics is not None and (row := _last_row(metrics)):
            loss = row.get("train/loss")
            numbers = f"loss {loss:.4f}" if isinstance(loss, float) else ""
            self._progress.update(bar, completed=row.get("step", 0), numbers=numbers)

    def end(self, name: str, kind: str, why: str, seconds: float) -> None:
        self._ended += 1
        if name in self._bars:
            self._progress.remove_task(self._bars.pop(name)[0])
        self._progress.update(self._all, completed=self._ended)
        if kind == "already finished":  # the plan has counted them
            return
        took = f", {seconds:.0f} s" if seconds else ""
        reason = f": {why}" if why else ""
        colour = COLOURS.get(kind, "yellow")
        self.console.print(
            f"{escape(f'[{self._ended}/{self._count}] {name}')}: [{colour}]{kind}[/]{took}{escape(reason)}",
            highlight=False,
            soft_wrap=True,
        )


def _last_row(path: Path) -> dict[str, float]:
    """The newest whole line; nothing while there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - TAIL_BYTES, 0))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            return an_object(parse_json(line, path, Reading(), finite=False), path, Reading())
        except UserError:
            continue
    return {}
