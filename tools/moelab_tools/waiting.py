"""How far a command is, on stderr, for those that take longer than two seconds."""

from __future__ import annotations

import sys
import time

import click

QUIET, EVERY = 2.0, 2.0  # seconds before the first word, and between words; a log gets fewer
EVERY_IN_A_LOG = 15.0


class Waiting:
    """`step()` after each of `total` pieces of work; `done()` at the end."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._terminal = sys.stderr.isatty()
        self._began = time.monotonic()
        self._told = self._began - EVERY_IN_A_LOG + QUIET
        self._spoke = False

    def step(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._began < QUIET or now - self._told < (EVERY if self._terminal else EVERY_IN_A_LOG):
            return
        self._told, self._spoke = now, True
        left = (now - self._began) / self._done * (self._total - self._done)
        line = f"{self._label}: {self._done:,} of {self._total:,}, about {left:.0f} s left"
        click.echo(f"\r{line:<78}" if self._terminal else line, err=True, nl=not self._terminal)

    def done(self) -> None:
        if self._spoke and self._terminal:
            click.echo(f"\r{'':<78}\r", err=True, nl=False)
