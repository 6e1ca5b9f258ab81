"""How much has been read: a line that is written over, or in a log one now and then; nobody knows the total."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import click

from moelab.data.corpus import Document
from moelab_tools.waiting import EVERY, QUIET


class Reading:
    """`add` each piece; says nothing in the first two seconds."""

    def __init__(self) -> None:
        self._documents = self._characters = 0
        self._began = time.monotonic()
        self._next = self._began + QUIET
        self._shown = False

    def add(self, piece: Sequence[Document]) -> None:
        self._documents += len(piece)
        self._characters += sum(len(document.text) for document in piece)
        now = time.monotonic()
        if now < self._next:
            return
        terminal = sys.stderr.isatty()
        self._next = now + (0.5 if terminal else EVERY)
        rate = self._characters / 1e6 / (now - self._began)
        line = f"data: {self._documents:,} documents, {self._characters / 1e6:,.1f} M characters, {rate:.1f} M/s"
        click.echo(f"\r{line}" if terminal else line, err=True, nl=not terminal)
        self._shown = terminal

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown:
            click.echo(err=True)
