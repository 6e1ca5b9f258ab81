"""A generator whose replies a test decides: a plugin as a user writes one, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import moelab

BATCHES: list[list[moelab.Question]] = []  # what it was asked, at once
SCRIPTS: dict[str, Callable[[moelab.Question], moelab.Reply]] = {}  # by name


@dataclass
class Options:
    script: str = "echo"
    stop_after: int = 0  # batches, then Ctrl-C; 0: never


def echo(question: moelab.Question) -> moelab.Reply:
    """The last turn and the seed, so that what hangs on either is seen."""
    return moelab.Reply(f"{question.messages[-1]['content']} [{question.seed % 1000}]")


def scripted(options: Options, context: moelab.GeneratorContext) -> moelab.TextGenerator:
    """A reply of a function in SCRIPTS."""

    def answer(questions: Sequence[moelab.Question]) -> list[moelab.Reply]:
        BATCHES.append(list(questions))
        if options.stop_after and len(BATCHES) > options.stop_after:
            raise KeyboardInterrupt
        return [SCRIPTS.get(options.script, echo)(one) for one in questions]

    return answer


@moelab.hookimpl
def moelab_generators() -> list[moelab.Component]:
    return [moelab.component("scripted", Options, scripted)]
