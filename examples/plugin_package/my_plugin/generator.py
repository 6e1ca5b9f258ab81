"""A generator: who answers what `moelab critique`, `evolve` and `tag` ask. This one says what it was told, shouting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import moelab


@dataclass
class Options:
    ending: str = "!"


def my_generator(options: Options, context: moelab.GeneratorContext) -> moelab.TextGenerator:
    """A function of questions: a reply to each. A model elsewhere is asked here, with `question.seed` as its seed."""

    def answer(questions: Sequence[moelab.Question]) -> list[moelab.Reply]:
        return [moelab.Reply(question.messages[-1]["content"].upper() + options.ending) for question in questions]

    return answer


@moelab.hookimpl
def moelab_generators() -> list[moelab.Component]:
    return [moelab.component("my_generator", Options, my_generator)]
