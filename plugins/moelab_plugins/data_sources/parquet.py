"""Documents as the rows of parquet files, read by pyarrow. `pip install 'moelab[parquet]'`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab import Component, Corpus, DataContext, DataError, Document, build_corpus, component, hookimpl
from moelab.data.reading import distinct_files
from moelab.safe_files import Reading, check_regular
from moelab_plugins.data_sources._records import ROWS, RecordOptions, Records, check_columns, require

READING = Reading(DataError, "data.source names it: download or write it again, or leave it out")
PATTERNS = ("**/*.parquet",)  # of a folder


@dataclass
class ParquetOptions(RecordOptions):
    pass


def parquet(options: ParquetOptions, context: DataContext) -> Corpus:
    """One document a row, its text in the column `text_key`; columns that aren't asked for are not read.

    As datasets on the Hugging Face hub are kept: `paths: [hf://datasets/org/name]`. Row groups are read one after the
    other, some hundred rows at a time.
    """
    arrow, files = require("pyarrow", "parquet", "parquet"), require("pyarrow.parquet", "parquet", "parquet")
    return build_corpus(_documents(options, context, arrow, files), context, deduplicate=options.deduplicate)


def _documents(options: ParquetOptions, context: DataContext, arrow: Any, files: Any) -> Iterator[Document]:
    records = Records(options, context.account)
    paths = [(None, path) for path in options.paths]
    for _, root, file in distinct_files(paths, context.places, PATTERNS, context.account):
        name, domain = file.relative_to(root).as_posix(), file.name.split(".", maxsplit=1)[0]
        batches = _batches(file, options, records, arrow, files)
        yield from records.rows(batches, lambda row, file=file: f"{file}: row {row}", name, domain)  # type: ignore[misc]


def _batches(
    file: Path, options: ParquetOptions, records: Records, arrow: Any, files: Any
) -> Iterator[Mapping[str, Sequence[Any]]]:
    check_regular(file, READING)
    row = 0
    try:
        with files.ParquetFile(file) as table:
            check_columns(table.schema_arrow.names, options, file)
            for batch in table.iter_batches(batch_size=ROWS, columns=options.keys):
                yield {key: values_of(batch.column(key)) for key in options.keys}
                row += batch.num_rows
    except (OSError, arrow.ArrowException) as error:
        what = "the rest of files that can't be read to their end"
        records.bad(what, DataError(f"data.source: {file} can't be read after row {row}: {error}; {READING.cure}"))


def values_of(column: Any) -> list[Any]:
    """A column as Python has it; a text that is not UTF-8 becomes bytes, which are no text."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return bytes(scalar.as_buffer())


@hookimpl
def moelab_data_sources() -> list[Component[DataContext, Corpus]]:
    return [component("parquet", ParquetOptions, parquet)]
