"""Documents as JSON, one object a line: plain, gzipped, or compressed by zstd."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab import Component, Corpus, DataContext, DataError, Document, build_corpus, component, hookimpl
from moelab.data.reading import decode_text, distinct_files
from moelab.safe_files import LARGEST_LINE, Reading, check_regular, parse_json
from moelab_plugins.data_sources._records import RecordOptions, Records, require

READING = Reading(DataError, "each line of data.source must be one whole object")
PATTERNS = ("**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst")  # of a folder
GZIP = b"\x1f\x8b"  # how a gzip file begins (RFC 1952, section 2.3.1)
ZSTD = b"\x28\xb5\x2f\xfd"  # how a zstd frame begins (RFC 8878, section 3.1.1)


@dataclass
class JsonlOptions(RecordOptions):
    pass


def jsonl(options: JsonlOptions, context: DataContext) -> Corpus:
    """One JSON object a line, its text under `text_key`; compressed or not, as the content says.

    A file named outright is read whatever it is called; of a folder, what ends in .jsonl, .jsonl.gz or .jsonl.zst (with
    moelab[parquet]: pyarrow decompresses it). A link has the name it is seen under, not that of what it points to.
    """
    return build_corpus(_documents(options, context), context, deduplicate=options.deduplicate)


def _documents(options: JsonlOptions, context: DataContext) -> Iterator[Document]:
    records = Records(options, context.account)
    for _, root, file in distinct_files(
        [(None, path) for path in options.paths], context.places, PATTERNS, context.account
    ):
        name, domain = file.relative_to(root).as_posix(), file.name.split(".", maxsplit=1)[0] or file.name
        for number, line in _lines(file, records):
            if line.strip():
                where = f"{file}:{number}"
                text = records.attempt("not text in UTF-8", decode_text, line, where)
                record = None if text is None else records.attempt("not JSON", _parsed, text, where)
                found = None if record is None else records.document(record, where, f"{name}:{number}", domain)
                if found is not None:
                    yield found


def _parsed(text: str, where: str) -> Any:
    record = parse_json(text, where, READING, finite=False, whole=False)
    if not isinstance(record, dict):
        raise DataError(
            f'data.source: {where} is not an object (it has: a {type(record).__name__}), as {{"text": ...}}'
        )
    return record


def _lines(file: Path, records: Records) -> Iterator[tuple[int, bytes]]:
    """(number, line), none longer than LARGEST_LINE, whatever the compressed bytes become."""
    check_regular(file, READING)
    number = 0
    try:
        with file.open("rb") as stream:
            lines = _decompressed(file, stream)
            while line := lines.readline(LARGEST_LINE + 1):
                number += 1
                if len(line) <= LARGEST_LINE:
                    yield number, line
                    continue
                said = f"data.source: {file}:{number} has more than {LARGEST_LINE >> 20} MiB; cut it"
                records.bad(f"lines of more than {LARGEST_LINE >> 20} MiB", DataError(said))
                while line and not line.endswith(b"\n"):
                    line = lines.readline(1 << 20)
    except (OSError, EOFError, zlib.error) as error:  # what gzip and pyarrow raise for a truncated or false archive
        said = f"data.source: {file} can't be read after line {number}: {error}; download or write it again"
        records.bad("the rest of files that can't be read to their end", DataError(said))


def _decompressed(file: Path, stream: io.BufferedReader) -> io.BufferedIOBase:
    begin = stream.peek(4)[:4]
    if begin[:2] == GZIP or file.suffix == ".gz":
        return gzip.GzipFile(fileobj=stream)
    if begin == ZSTD or file.suffix == ".zst":
        return io.BufferedReader(require("pyarrow", "parquet", f"paths: {file}").CompressedInputStream(stream, "zstd"))
    return stream


@hookimpl
def moelab_data_sources() -> list[Component[DataContext, Corpus]]:
    return [component("jsonl", JsonlOptions, jsonl)]
