"""Drops documents that say again what an earlier one said, so that held-out text is not training text.

Exact copies go first; then documents whose longer lines were mostly seen before: licences differ in a name
and a year, generated headers in a type.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

LINE_CHARACTERS = 24  # a shorter line ("return result", "#endif") is no sign of copying
REPEATED_SHARE = 0.5  # of the longer lines' characters


class HasText(Protocol):
    @property
    def text(self) -> str: ...


DocumentT = TypeVar("DocumentT", bound=HasText)


def novel(documents: Iterable[DocumentT]) -> Iterator[DocumentT]:
    """The documents that are kept, in order: the first of each kind stays."""
    seen_texts: set[int] = set()
    seen_lines: set[int] = set()
    for document in documents:
        # hash() is salted per process, but only whether two are equal matters here.
        key = hash(document.text)
        if key in seen_texts:
            continue
        seen_texts.add(key)
        keys = {hash(line): len(line) for line in _longer_lines(document.text)}
        total = sum(keys.values())
        repeated = sum(length for line, length in keys.items() if line in seen_lines)
        if total and repeated > REPEATED_SHARE * total:
            continue
        seen_lines.update(keys)
        yield document


def _longer_lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if len(line) >= LINE_CHARACTERS:
            normalised = " ".join(line.lower().split())
            if len(normalised) >= LINE_CHARACTERS:
                yield normalised
