"""A worker that runs a sweep's commands in the test's own process, and the smallest config there is."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console

from moelab_tools import cli

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    str(ROOT / "configs/train/tiny_moe.yaml"), "train.steps=2", "train.batch_size=2", "train.sequence_length=32",
    "train.threads=1", "train.log_every=1", "train.gradient_shares_every=0", "model.num_hidden_layers=1",
    "model.hidden_size=16", "model.intermediate_size=48", "model.num_attention_heads=2", "model.num_key_value_heads=1",
    "model.moe.layout.moe_intermediate_size=16", "model.moe.layout.num_experts=4", "observers=[]",
    "evaluation.sequences=4", "evaluation.sample_tokens=0", "entry_points=false",
    f"data.source={{name: text, paths: [{ROOT / 'LICENSE'}], separator: \"\\n\\n\"}}", "data.validation_fraction=0.2",
]  # fmt: skip


@dataclass
class Ended:
    """A job that was over when it was started."""

    code: int

    def poll(self) -> int:
        return self.code

    def stop(self) -> None:
        pass


@dataclass
class InProcess:
    """Runs commands one after another, here; `before` may raise, or answer with an exit code of its own."""

    goes_on = False
    before: Callable[[str], int | None] = lambda name: None
    started: list[str] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)

    def start(self, name: str, arguments: Sequence[str], log: Path) -> Ended:
        self.started.append(name)
        self.commands.append(list(arguments))
        code = self.before(name)
        if code is not None:
            return Ended(code)
        log.parent.mkdir(parents=True, exist_ok=True)
        tellers = list(logging.getLogger("moelab").handlers)
        with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            code = cli.run(list(arguments))
            click.echo("", file=file)
        logging.getLogger("moelab").handlers = tellers
        return Ended(code)


def quiet() -> Console:
    """A console whose text can be asked for: `console.export_text()`."""
    return Console(record=True, width=200, file=open("/dev/null", "w"))
