"""What every generator must do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.components import Component
from moelab.data.generating import GeneratorContext, Question, Reply, TextGenerator, generator_fault, identity_of
from moelab.paths import Places
from moelab.testing.report import make_options, promised, run_checks

CONVERSATIONS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "What is two and two?"),),
    (("system", "Be brief."), ("user", "中文 \U0001f600\x00\ufeff")),
    (("user", "Hello."), ("assistant", "Hello!"), ("user", "Name a colour.\n\nThen another one.")),
    (("user", "x"),),
)


@dataclass
class GeneratorCase:
    """One generator under test."""

    component: Component[GeneratorContext, TextGenerator]
    options: Any = None
    base: Path = Path()  # relative paths count from here, as from a config file's folder

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)

    def build(self) -> TextGenerator:
        return self.component.build(self.options, GeneratorContext(Places(search=(self.base,))))

    def questions(self) -> list[Question]:
        return [
            Question([{"role": role, "content": text} for role, text in turns], seed=2**62 + number)
            for number, turns in enumerate(CONVERSATIONS)
        ]


def answers_each_with_a_reply(case: GeneratorCase) -> None:
    """A moelab.Reply of a text, and whether it ended by itself; one question alone too."""
    apply, questions = case.build(), case.questions()
    for some in (questions, questions[:1]):
        promised(generator_fault(apply(some), len(some)), apply)


def says_the_same_again_in_other_company(case: GeneratorCase) -> None:
    """A reply hangs on its question and seed, so that what was stopped goes on to the same lines."""
    apply, questions = case.build(), case.questions()
    forth = _texts(apply(questions))
    back = _texts(apply(questions[::-1]))[::-1]
    alone = [_texts(apply([question]))[0] for question in questions]
    fresh = _texts(case.build()(questions))
    assert forth == back == alone == fresh, (
        f"another reply in other company, or asked again: {forth}, reversed {back}, alone {alone}, anew {fresh}"
    )


def leaves_its_questions_as_they_are(case: GeneratorCase) -> None:
    """They are asked again after a stop."""
    questions = case.questions()
    before = [[dict(turn) for turn in one.messages] for one in questions]
    case.build()(questions)
    assert [[dict(turn) for turn in one.messages] for one in questions] == before, "changed the messages of a question"


def knows_itself_in_json(case: GeneratorCase) -> None:
    """Its `identity`, where it has one, goes into every line that is made."""
    json.dumps(identity_of(case.build()))


def _texts(replies: Sequence[Reply]) -> list[tuple[str, bool]]:
    return [(reply.text, reply.ended) for reply in replies]


GENERATOR_CHECKS: tuple[Callable[[GeneratorCase], None], ...] = (
    answers_each_with_a_reply,
    says_the_same_again_in_other_company,
    leaves_its_questions_as_they_are,
    knows_itself_in_json,
)


def check_generator(
    component: Component[GeneratorContext, TextGenerator], options: Any = None, *, base: Path = Path()
) -> None:
    """Run every check of GENERATOR_CHECKS; raises ConformanceError naming those that fail."""
    run_checks("generator", component, GeneratorCase(component, options, base), GENERATOR_CHECKS)
