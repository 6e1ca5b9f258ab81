"""Documents as JSON, one object a line, plain or gzipped."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelab import Component, ConfigError, Corpus, DataContext, DataError, Document, build_corpus, component, hookimpl
from moelab.data.reading import decode_text, resolve_files


@dataclass
class JsonlOptions:
    paths: list[str] = field(default_factory=list)  # files, globs or folders (of which *.jsonl and *.jsonl.gz are read)
    text_key: str = "text"
    domain_key: str | None = None  # null: the domain is the file's name
    deduplicate: bool = True  # drop exact and near copies before the split


def jsonl(options: JsonlOptions, context: DataContext) -> Corpus:
    """One JSON object a line (*.jsonl, *.jsonl.gz), its text under `text_key`."""
    if not options.paths:
        raise ConfigError("paths: nothing to read; give `paths: [...]`")
    return build_corpus(_documents(options, context.base), context, deduplicate=options.deduplicate)


def _documents(options: JsonlOptions, base: Path) -> Iterator[Document]:
    files = [file for path in options.paths for file in resolve_files(path, base, "**/*.jsonl*")[1]]
    for file in dict.fromkeys(file.resolve() for file in files):
        for number, line in enumerate(_lines(file), 1):
            if line.strip():
                yield _document(line, f"{file}:{number}", f"{file.name}:{number}", options)


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            yield from stream
    except (OSError, EOFError, zlib.error) as error:  # what gzip raises for a truncated or false archive
        raise DataError(f"data.source: {file} can't be read: {error}; download or write it again") from error


def _document(line: bytes, where: str, name: str, options: JsonlOptions) -> Document:
    try:
        record: Any = json.loads(decode_text(line, where))
    except json.JSONDecodeError as error:
        raise DataError(f"data.source: {where} is no JSON: {error}; each line must be one whole object") from error
    domain = name.split(".", maxsplit=1)[0]
    if options.domain_key is not None:
        domain = _string(record, options.domain_key, "domain_key", where)
    return Document(_string(record, options.text_key, "text_key", where), domain, name)


def _string(record: Any, key: str, option: str, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        found = ", ".join(map(str, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise DataError(f"data.source: {where} has no string '{key}' (it has: {found}); set data.source.{option}")
    return str(record[key])


@hookimpl
def moelab_data_sources() -> list[Component[DataContext, Corpus]]:
    return [component("jsonl", JsonlOptions, jsonl)]
