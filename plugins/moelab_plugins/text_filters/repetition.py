"""Texts that say the same again and again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from moelab import Component, Document, FilterContext, Rejected, TextFilter, component, hookimpl

_PARAGRAPHS = re.compile(r"\n{2,}")


@dataclass
class RepetitionOptions:
    duplicate_lines: float | None = 0.30  # share of lines that were there before; null: not looked at
    duplicate_line_characters: float | None = 0.20  # share of the characters in them
    duplicate_paragraphs: float | None = 0.30
    duplicate_paragraph_characters: float | None = 0.20
    # [[words in a row, share of the characters], ...]; []: not looked at.
    top_ngrams: list[list[float]] = field(default_factory=lambda: [[2, 0.20], [3, 0.18], [4, 0.16]])
    duplicate_ngrams: list[list[float]] = field(
        default_factory=lambda: [[5, 0.15], [6, 0.14], [7, 0.13], [8, 0.12], [9, 0.11], [10, 0.10]]
    )

    def __post_init__(self) -> None:
        for key in ("top_ngrams", "duplicate_ngrams"):
            for pair in getattr(self, key):
                if len(pair) != 2 or pair[0] < 1 or pair[0] != int(pair[0]):
                    raise ValueError(f"{key}: {list(pair)} is no pair of a number of words and a share, as [2, 0.2]")


def repetition(options: RepetitionOptions, context: FilterContext) -> TextFilter:
    """Repeated lines and paragraphs, the commonest n-gram, and n-grams that were there before.

    Words stand between white space; the characters of an n-gram are those of its words. In "duplicate n-grams" a word
    counts once, however many of them it stands in.

    Source: Gopher, 2112.11446, table A1 (the defaults, as datatrove's filter quotes them; that filter joins words with
    spaces and takes NLTK's words, so its shares differ a little).
    Use: web pages; menus, spam, broken scrapes.
    Cost: source code, tables and verse repeat by nature: give this `domains`.
    """

    top, duplicate = (
        [(int(size), limit) for size, limit in limits] for limits in (options.top_ngrams, options.duplicate_ngrams)
    )

    def apply(document: Document) -> Document | Rejected:
        text = document.text
        for name, pieces, most, most_characters in (
            ("paragraphs", _PARAGRAPHS.split(text.strip()), options.duplicate_paragraphs,
             options.duplicate_paragraph_characters),
            ("lines", [line for line in text.splitlines() if line.strip()], options.duplicate_lines,
             options.duplicate_line_characters),
        ):  # fmt: skip
            count, characters = _repeated(pieces)
            if most is not None and count > most * len(pieces):
                return Rejected(f"repeated {name}", f"{count / len(pieces):.2f} of the {name}, at most {most}")
            if most_characters is not None and characters > most_characters * len(text):
                share = characters / len(text)
                return Rejected(
                    f"characters in repeated {name}", f"{share:.2f} of the characters, at most {most_characters}"
                )
        words = text.split()
        total = sum(map(len, words))
        again = _repeating(words, sorted({size for size, _ in [*top, *duplicate]}))
        for size, limit in top:
            if (share := _commonest(words, again[size], size) / max(total, 1)) > limit:
                return Rejected(f"one {size}-gram again and again", f"{share:.2f} of the characters, at most {limit}")
        for size, limit in duplicate:
            if (share := _in_repeated(words, again[size], size) / max(total, 1)) > limit:
                return Rejected(f"repeated {size}-grams", f"{share:.2f} of the characters, at most {limit}")
        return document

    return apply


def _repeated(pieces: Sequence[str]) -> tuple[int, int]:
    """How many pieces were there before, and their characters."""
    counts = Counter(pieces)
    return len(pieces) - len(counts), sum((count - 1) * len(piece) for piece, count in counts.items())


def _repeating(words: Sequence[str], sizes: Sequence[int]) -> dict[int, list[int]]:
    """For each of the ascending sizes the places, ascending, where an n-gram begins that stands in the text twice.

    An n-gram that does begins with a shorter one that does, so each size looks at what is left of the one before.
    """
    found: dict[int, list[int]] = {}
    starts: Sequence[int] = range(len(words))
    for size in sizes:
        starts = [start for start in starts if start + size <= len(words)]
        ngrams = [tuple(words[start : start + size]) for start in starts]
        counts = Counter(ngrams)
        starts = [start for start, ngram in zip(starts, ngrams, strict=True) if counts[ngram] > 1]
        found[size] = starts
    return found


def _commonest(words: Sequence[str], starts: Sequence[int], size: int) -> int:
    """Characters in the n-gram that takes the most of them; 0 where none stands twice."""
    counts = Counter(tuple(words[start : start + size]) for start in starts)
    return max((count * sum(map(len, ngram)) for ngram, count in counts.items()), default=0)


def _in_repeated(words: Sequence[str], starts: Sequence[int], size: int) -> int:
    """Characters of the words that stand in an n-gram which was there before."""
    seen: set[tuple[str, ...]] = set()
    covered = characters = 0  # words before `covered` are counted
    for start in starts:
        ngram = tuple(words[start : start + size])
        if ngram in seen:
            characters += sum(map(len, words[max(start, covered) : start + size]))
            covered = start + size
        seen.add(ngram)
    return characters


@hookimpl
def moelab_text_filters() -> list[Component[FilterContext, TextFilter]]:
    return [component("repetition", RepetitionOptions, repetition)]
