"""Documents as JSON, one object a line, plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelab import Component, ConfigError, Corpus, DataContext, DataError, Document, build_corpus, component, hookimpl
from moelab.data.reading import decode_text, distinct_files
from moelab.safe_files import LARGEST_LINE, Reading, check_regular, parse_json

READING = Reading(DataError, "each line of data.source must be one whole object")
PATTERNS = ("**/*.jsonl", "**/*.jsonl.gz")  # of a folder
GZIP = b"\x1f\x8b"  # how a gzip file begins (RFC 1952, section 2.3.1)


@dataclass
class JsonlOptions:
    paths: list[str] = field(default_factory=list)  # files, globs or folders (of which *.jsonl and *.jsonl.gz are read)
    text_key: str = "text"
    domain_key: str | None = None  # null: the domain is the file's name up to its first dot
    deduplicate: bool = True  # drop exact and near copies before the split


def jsonl(options: JsonlOptions, context: DataContext) -> Corpus:
    """One JSON object a line, its text under `text_key`; gzipped or not, as the content says.

    A file named outright is read whatever it is called; of a folder, what ends in .jsonl or .jsonl.gz. A link has the
    name it is seen under, not that of what it points to.
    """
    if not options.paths:
        raise ConfigError("paths: nothing to read; give `paths: [...]`")
    return build_corpus(_documents(options, context), context, deduplicate=options.deduplicate)


def _documents(options: JsonlOptions, context: DataContext) -> Iterator[Document]:
    for _, root, file in distinct_files(
        [(None, path) for path in options.paths], context.places, PATTERNS, context.account
    ):
        name, domain = file.relative_to(root).as_posix(), file.name.split(".", maxsplit=1)[0] or file.name
        for number, line in enumerate(_lines(file), 1):
            if line.strip():
                text, own = _text(line, f"{file}:{number}", options)
                yield Document(text, own or domain, f"{name}:{number}")


def _lines(file: Path) -> Iterator[bytes]:
    check_regular(file, READING)
    try:
        with file.open("rb") as stream:
            zipped = stream.peek(2)[:2] == GZIP or file.suffix == ".gz"
            lines = gzip.GzipFile(fileobj=stream) if zipped else stream
            while line := lines.readline(LARGEST_LINE + 1):
                if len(line) > LARGEST_LINE:
                    raise DataError(f"data.source: {file} has a line of more than {LARGEST_LINE >> 20} MiB; cut it")
                yield line
    except (OSError, EOFError, zlib.error) as error:  # what gzip raises for a truncated or false archive
        raise DataError(f"data.source: {file} can't be read: {error}; download or write it again") from error


def _text(line: bytes, where: str, options: JsonlOptions) -> tuple[str, str | None]:
    """(text, domain where a key names it)."""
    record = parse_json(decode_text(line, where), where, READING, finite=False, whole=False)
    own = None if options.domain_key is None else _string(record, options.domain_key, "domain_key", where)
    return _string(record, options.text_key, "text_key", where), own


def _string(record: Any, key: str, option: str, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        found = ", ".join(map(str, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise DataError(f"data.source: {where} has no string '{key}' (it has: {found}); set data.source.{option}")
    return str(record[key])


@hookimpl
def moelab_data_sources() -> list[Component[DataContext, Corpus]]:
    return [component("jsonl", JsonlOptions, jsonl)]
