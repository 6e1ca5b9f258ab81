"""Texts that hold what a model will be tested on."""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path

from moelab import Component, ConfigError, DataError, Document, FilterContext, Rejected, TextFilter, component, hookimpl
from moelab.data.reading import READING, decode_text, read_text, resolve_files
from moelab.data.words import words as words_of
from moelab.safe_files import LARGEST_TEXT, check_regular, parse_json
from moelab_plugins.text_filters._lm_eval_tasks import FILES, strings_of, task_texts

logger = logging.getLogger("moelab")


@dataclass
class DecontaminateOptions:
    against: list[str] = field(default_factory=list)  # text files, globs, folders: what is tested on
    # Tasks, groups or tags of lm-evaluation-harness by name (gsm8k, mmlu), or its YAML files; needs moelab[lm-eval].
    tasks: list[str] = field(default_factory=list)
    words: int = 13  # in a row that both have
    least: int = 8  # words of a text that is shorter, and so looked for whole; one of fewer is not looked for


def decontaminate(options: DecontaminateOptions, context: FilterContext) -> TextFilter:
    """Leaves out a document that shares `words` words in a row with a text it must not hold.

    Words are runs of letters and digits in lower case, and of Chinese, Japanese, Thai and the like each character. A
    text to be tested on that is shorter than `words` is looked for whole, unless it has fewer than `least`: "Paris" is
    an answer of many tests, and stands in many innocent texts. Of a .jsonl file, also gzipped, and of a task every
    string of every example counts, whatever its key.

    Source: GPT-3 (2005.14165, appendix C): N words in a row without case and punctuation, N from 8 to 13.
    Use: against every set that results will be shown for.
    Cost: memory for the n-grams of what is tested on; phrases that all licences share, if a test holds one.
    """
    if not options.against and not options.tasks:
        raise ConfigError("against: nothing to look for; name files or folders with the texts that are tested on")
    if min(options.words, options.least) < 1:
        raise ConfigError(f"words: {options.words}, least: {options.least}; at least 1 each")
    known: dict[tuple[str, ...], str] = {}
    short, least = 0, min(options.least, options.words)
    for source, text in _tested(options, context):
        words = words_of(text)
        short += len(words) < least
        for ngram in _ngrams(words, min(options.words, len(words))) if len(words) >= least else ():
            known.setdefault(ngram, source)
    if not known:
        raise DataError(f"against: none of {short:,} texts has {least} words; look for others, or lower `least`")
    if short and parent_process() is None:
        logger.warning(
            "decontaminate: %s texts of fewer than %d words are not looked for (`least`)", f"{short:,}", least
        )
    sizes = sorted({len(ngram) for ngram in known}, reverse=True)

    def apply(document: Document) -> Document | Rejected:
        words = words_of(document.text)
        for size in sizes:
            for ngram in _ngrams(words, size):
                if ngram in known:
                    return Rejected("tested on", f"{known[ngram]}: '{' '.join(ngram)}'")
        return document

    return apply


def _ngrams(words: list[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(size)), strict=False) if size else iter(())


def _tested(options: DecontaminateOptions, context: FilterContext) -> Iterator[tuple[str, str]]:
    """(where it is from, text) of all that is tested on."""
    for path in options.against:
        for file in resolve_files(path, context.places)[1]:
            for text in _texts(file):
                yield file.name, text
    if options.tasks:
        yield from task_texts(
            tuple(str(context.find(name)) if name.endswith(FILES) else name for name in options.tasks)
        )


def _texts(file: Path) -> Iterator[str]:
    if ".jsonl" not in file.suffixes:
        yield read_text(file)
        return
    if file.suffix == ".gz":
        content = _gunzipped(file)
    elif file.suffix == ".jsonl":
        content = read_text(file)
    else:
        READING.refuse(file, "is compressed in a way that is not read here; gzip it")
    for number, line in enumerate(content.split("\n"), 1):  # U+2028 and the like end no line of JSON
        if line.strip():
            where = f"{file}:{number}"
            yield from strings_of(parse_json(line, where, READING, finite=False, whole=False))


def _gunzipped(file: Path) -> str:
    check_regular(file, READING)
    try:
        with gzip.open(file, "rb") as stream:
            content = stream.read(LARGEST_TEXT + 1)
    except (OSError, EOFError, zlib.error) as error:
        READING.refuse(file, f"can't be read: {error}", error)
    if len(content) > LARGEST_TEXT:
        READING.refuse(file, f"holds more than {LARGEST_TEXT >> 20} MiB; cut it")
    return decode_text(content, str(file))


@hookimpl
def moelab_text_filters() -> list[Component[FilterContext, TextFilter]]:
    return [component("decontaminate", DecontaminateOptions, decontaminate)]
