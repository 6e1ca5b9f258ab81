"""What a text filter is: it keeps a document, changes it, or says why it goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from moelab.data.corpus import Document
from moelab.data.reading import resolve_path
from moelab.paths import Places


@dataclass(frozen=True)
class Rejected:
    """Why a document is left out."""

    reason: str  # the same words for all documents of one kind: they are counted by it
    measured: str = ""  # of this one, as in "0.31 of the lines, at most 0.3"


@dataclass(frozen=True)
class FilterContext:
    """What a text filter is told beside its options."""

    places: Places = field(default_factory=Places)  # where files that the options name are looked for
    registry: Any = None  # moelab.Registry, which stands above this; for filters made of others, which None refuses

    def find(self, path: str) -> Path:
        """The file or folder that an option names. Raises DataError with the places that were tried."""
        return resolve_path(path, self.places)


class TextFilter(Protocol):
    """A function of one document alone: the same answer in whatever process and order documents come.

    Returns the document, as it is or with another text, or why it goes. Domain and name stay.
    """

    def __call__(self, document: Document) -> Document | Rejected: ...
