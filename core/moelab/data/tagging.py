"""What a tagger is: it says one thing of a document, in one of a few words."""

from __future__ import annotations

from typing import Protocol

from moelab.data.corpus import Document

RESERVED = ("text", "messages", "domain", "name", "stage", "reason", "measured")  # keys of a row that are no tag
LONGEST = 40  # characters of a value


class Tagger(Protocol):
    """A function of one document alone: the same answer in whatever process and order documents come.

    The answer is one of few values, such as "en" or "python", at most LONGEST characters; "" where it can't tell.
    """

    def __call__(self, document: Document) -> str: ...


def tag_fault(answer: object) -> str | None:
    """A phrase for `PluginPart.fault`, or None."""
    if not isinstance(answer, str):
        return f"returned {answer!r}; it must return a text"
    if len(answer) > LONGEST or not (answer.isprintable() and answer == answer.strip()):
        return f"returned {answer[:80]!r}; a tag is a word or two, at most {LONGEST} characters"
    return None
