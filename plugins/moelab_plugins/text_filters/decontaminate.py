"""Texts that hold what a model will be tested on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moelab import Component, ConfigError, Document, FilterContext, Rejected, TextFilter, component, hookimpl
from moelab.data.reading import read_text, resolve_files

_WORDS = re.compile(r"\w+")


@dataclass
class DecontaminateOptions:
    against: list[str] = field(default_factory=list)  # text files, globs, folders: what is tested on
    words: int = 13  # in a row that both have


def decontaminate(options: DecontaminateOptions, context: FilterContext) -> TextFilter:
    """Leaves out a document that shares `words` words in a row with a text it must not hold.

    Words are runs of letters and digits in lower case. A text to be tested on that is shorter than `words` is looked
    for whole. Of a .jsonl file every string of every line counts, whatever its key.

    Source: 13-gram overlap, GPT-3 (2005.14165, appendix C).
    Use: against every set that results will be shown for.
    Cost: memory for the n-grams of what is tested on; phrases that all licences share, if a test holds one.
    """
    if not options.against:
        raise ConfigError("against: nothing to look for; name files or folders with the texts that are tested on")
    if options.words < 1:
        raise ConfigError(f"words: {options.words}; at least 1")
    known: dict[tuple[str, ...], str] = {}
    for path in options.against:
        for file in resolve_files(path, context.places)[1]:
            for text in _texts(file):
                words = _split(text)
                for ngram in _ngrams(words, min(options.words, len(words))):
                    known.setdefault(ngram, file.name)
    sizes = sorted({len(ngram) for ngram in known}, reverse=True)

    def apply(document: Document) -> Document | Rejected:
        words = _split(document.text)
        for size in sizes:
            for ngram in _ngrams(words, size):
                if ngram in known:
                    return Rejected("tested on", f"{known[ngram]}: '{' '.join(ngram)}'")
        return document

    return apply


def _split(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def _ngrams(words: list[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(size)), strict=False) if size else iter(())


def _texts(file: Path) -> Iterable[str]:
    if file.suffix != ".jsonl":
        return [read_text(file)]
    return [text for line in read_text(file).splitlines() if line.strip() for text in _strings(line, file)]


def _strings(line: str, file: Path) -> list[str]:
    from moelab.data.reading import READING
    from moelab.safe_files import parse_json

    found, left = [], [parse_json(line.encode(), str(file), READING, finite=False, whole=False)]
    while left:
        value = left.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
    return found


@hookimpl
def moelab_text_filters() -> list[Component[FilterContext, TextFilter]]:
    return [component("decontaminate", DecontaminateOptions, decontaminate)]
