"""How far a command is, on stderr, if it takes longer than two seconds: a bar, or in a log a line now and then."""

from __future__ import annotations

import sys
import time

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from moelab_tools.terminal import make_console

QUIET, EVERY = 2.0, 15.0  # seconds before the first word, and between the lines of a log


class Waiting:
    """`with Waiting(label, total) as waiting`, and `waiting.step()` after each piece of work."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._terminal = sys.stderr.isatty()
        self._began = time.monotonic()
        self._next = self._began + QUIET
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def step(self) -> None:
        self._done += 1
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done)
        elif now < self._next:
            return
        elif self._terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=make_console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total, completed=self._done)
        else:
            self._next = now + EVERY
            left = (now - self._began) / self._done * (self._total - self._done)
            click.echo(f"{self._label}: {self._done:,} of {self._total:,}, about {left:.0f} s left", err=True)

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
