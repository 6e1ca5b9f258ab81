"""What every text filter must do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.components import Component
from moelab.data.corpus import Document
from moelab.data.filtering import FilterContext, Rejected, TextFilter
from moelab.paths import Places
from moelab.plugin_faults import article
from moelab.testing.report import make_options, promised, run_checks

TEXTS = (
    "",
    " \n\t\n",
    "One.",
    "The cat sat on the mat, and the dog sat beside it.\n" * 3,
    "def f(x):\r\n    return x + 1   \r\n",
    "\ufeffcafe\u0301 naïve \x07 中文文本。\n\n\n第二段。",
    " ".join(str(n * n) for n in range(300)),
    "\n\n".join(f"Paragraph {n} speaks of {n * 7 % 31} things and of nothing else." for n in range(40)),
)


@dataclass
class TextFilterCase:
    """One text filter under test."""

    component: Component[FilterContext, TextFilter]
    options: Any = None
    base: Path = Path()  # relative paths count from here, as from a config file's folder
    texts: Sequence[str] = TEXTS

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)

    def build(self) -> TextFilter:
        return self.component.build(self.options, FilterContext(Places(search=(self.base,))))

    def answers(self) -> list[Document | Rejected]:
        apply = self.build()
        return [apply(Document(text, "a", f"{number}.txt")) for number, text in enumerate(self.texts)]


def answers_with_a_document_or_a_reason(case: TextFilterCase) -> None:
    """The document's domain and name stay; a reason has words."""
    for number, answer in enumerate(case.answers()):
        known = isinstance(answer, Document | Rejected)
        promised(None if known else f"returned {article(answer)}; it must return a moelab.Document or Rejected", case)
        if isinstance(answer, Document):
            assert (answer.domain, answer.name) == ("a", f"{number}.txt"), "the document has another domain or name"
        else:
            assert answer.reason.strip(), "a document is left out and no reason is given"


def gives_the_same_answer_again(case: TextFilterCase) -> None:
    """In another process too: nothing of one document is remembered for the next."""
    apply = case.build()
    documents = [Document(text, "a", f"{number}.txt") for number, text in enumerate(case.texts)]
    forth = [apply(document) for document in documents]
    back = [apply(document) for document in reversed(documents)]
    assert forth == list(reversed(back)) == case.answers(), "another answer when documents come in another order"


def changes_nothing_the_second_time(case: TextFilterCase) -> None:
    """What was changed once is as it should be."""
    apply = case.build()
    for answer in case.answers():
        if isinstance(answer, Document):
            again = apply(answer)
            assert again == answer, f"'{answer.text[:40]}' is kept and, given again, becomes {again}"


TEXT_FILTER_CHECKS: tuple[Callable[[TextFilterCase], None], ...] = (
    answers_with_a_document_or_a_reason,
    gives_the_same_answer_again,
    changes_nothing_the_second_time,
)


def check_text_filter(
    component: Component[FilterContext, TextFilter], options: Any = None, *, base: Path = Path()
) -> None:
    """Run every check of TEXT_FILTER_CHECKS; raises ConformanceError naming those that fail."""
    run_checks("text filter", component, TextFilterCase(component, options, base), TEXT_FILTER_CHECKS)
