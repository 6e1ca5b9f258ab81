"""Texts that look like those that are wanted: a small classifier, trained when the stage is built."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import parent_process
from pathlib import Path

from moelab import Component, ConfigError, Document, FilterContext, Rejected, TextFilter, component, hookimpl
from moelab.data.reading import READING, read_text, resolve_files
from moelab.safe_files import json_lines
from moelab_plugins.text_filters._ngram_classifier import Classifier, train

LEAST = 20  # documents of each kind
logger = logging.getLogger("moelab")


@dataclass
class ClassifierOptions:
    wanted: list[str] = field(default_factory=list)  # files, globs or folders of texts like those to keep
    other: list[str] = field(default_factory=list)  # of texts like those to leave out
    text_key: str = "text"  # of .jsonl files; any other file is one document
    least: float = (
        0.5  # probability of being wanted, from which a document is kept; both kinds counted as equally common
    )
    ngrams: int = 2  # words in a row that are looked at, and fewer
    buckets: int = 1 << 18  # that they are hashed into; 8 bytes each
    passes: int = 5  # over the texts

    def __post_init__(self) -> None:
        if not 0 <= self.least <= 1:
            raise ValueError(f"least: {self.least} is no probability")
        if min(self.ngrams, self.buckets, self.passes) < 1:
            raise ValueError("ngrams, buckets and passes: at least 1 each")


def classifier(options: ClassifierOptions, context: FilterContext) -> TextFilter:
    """Keeps what a linear model of hashed n-grams, trained on examples of both kinds, takes for wanted.

    A fifth of the examples calibrates it, so that `least` is a probability; how often it is right there, and how far
    its probabilities are off, is told when it is built. Look at `account.html` for what it drops by domain: it learns
    whatever tells the two kinds apart, a domain too.

    Source: the idea is GPT-3's (2005.14165, appendix A) and DataComp-LM's (2406.11794), which were not opened for this;
    the latter's fastText model this is not: no hidden layer, words by regular expression.
    Use: quality of a kind that one has examples of.
    Cost: it is trained in each process; what resembles no example is judged all the same.
    """
    if not options.wanted or not options.other:
        raise ConfigError("wanted: needs examples of both kinds; give `wanted: [...]` and `other: [...]`")
    kinds = [tuple(_files(paths, context)) for paths in (options.wanted, options.other)]
    made = _trained(kinds[0], kinds[1], options.text_key, options.ngrams, options.buckets, options.passes)

    def apply(document: Document) -> Document | Rejected:
        probability = made.probability(document.text)
        if probability < options.least:
            return Rejected("not like what is wanted", f"probability {probability:.3f}, at least {options.least}")
        return document

    return apply


def _files(paths: list[str], context: FilterContext) -> Iterator[Path]:
    for path in paths:
        yield from resolve_files(path, context.places)[1]


@cache
def _trained(
    wanted: tuple[Path, ...], other: tuple[Path, ...], text_key: str, ngrams: int, buckets: int, passes: int
) -> Classifier:
    """Once in a process, told by the first."""
    texts = [[text for file in files for text in _texts(file, text_key)] for files in (wanted, other)]
    for name, found in zip(("wanted", "other"), texts, strict=True):
        if len(set(found)) < LEAST:
            raise ConfigError(f"{name}: {len(set(found))} different documents; at least {LEAST} are needed")
    made = train(*texts, ngrams=ngrams, size=buckets, passes=passes)
    if parent_process() is None:
        logger.warning(
            "stages: a classifier of %d wanted documents and %d others; of %d that it did not see it judges %.1f %% "
            "rightly, and its probabilities are %.3f off", len(texts[0]), len(texts[1]), made.quality.documents,
            100 * made.quality.right, made.quality.calibration_error,
        )  # fmt: skip
    return made


def _texts(file: Path, text_key: str) -> Iterator[str]:
    if ".jsonl" not in file.suffixes:
        yield read_text(file)
        return
    for where, row in json_lines(file, READING):
        if not isinstance(row.get(text_key), str):
            READING.refuse(where, f"has no string '{text_key}'; set text_key")
        yield row[text_key]


@hookimpl
def moelab_text_filters() -> list[Component[FilterContext, TextFilter]]:
    return [component("classifier", ClassifierOptions, classifier)]
