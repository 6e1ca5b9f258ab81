"""What every tagger must do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.components import Component
from moelab.data.corpus import Document
from moelab.data.filtering import FilterContext
from moelab.data.tagging import Tagger, tag_fault
from moelab.paths import Places
from moelab.testing.report import make_options, promised, run_checks
from moelab.testing.text_filters import TEXTS


@dataclass
class TaggerCase:
    """One tagger under test."""

    component: Component[FilterContext, Tagger]
    options: Any = None
    base: Path = Path()  # relative paths count from here, as from a config file's folder
    texts: Sequence[str] = TEXTS

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)

    def build(self) -> Tagger:
        return self.component.build(self.options, FilterContext(Places(search=(self.base,))))

    def documents(self) -> list[Document]:
        return [Document(text, "a", f"{number}.txt") for number, text in enumerate(self.texts)]


def answers_with_a_short_text(case: TaggerCase) -> None:
    """A word or two, or none."""
    apply = case.build()
    for document in case.documents():
        promised(tag_fault(apply(document)), case)


def says_the_same_again(case: TaggerCase) -> None:
    """In another process too: nothing of one document is remembered for the next."""
    apply = case.build()
    forth = [apply(document) for document in case.documents()]
    back = [apply(document) for document in reversed(case.documents())]
    fresh = [case.build()(document) for document in case.documents()]
    assert forth == list(reversed(back)) == fresh, "another answer when documents come in another order"


TAGGER_CHECKS: tuple[Callable[[TaggerCase], None], ...] = (answers_with_a_short_text, says_the_same_again)


def check_tagger(component: Component[FilterContext, Tagger], options: Any = None, *, base: Path = Path()) -> None:
    """Run every check of TAGGER_CHECKS; raises ConformanceError naming those that fail."""
    run_checks("tagger", component, TaggerCase(component, options, base), TAGGER_CHECKS)
