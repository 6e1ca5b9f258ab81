"""Documents from a folder that `datasets` saved. `pip install 'moelab[datasets]'`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab import Component, Corpus, DataContext, DataError, Document, build_corpus, component, hookimpl
from moelab.hub import folder_name
from moelab_plugins.data_sources._records import ROWS, RecordOptions, Records, check_columns, require


@dataclass
class DatasetsOptions(RecordOptions):
    split: str | None = None  # of several, say "train"; null: all of them, domains where no key says them


def datasets(options: DatasetsOptions, context: DataContext) -> Corpus:
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, mapped into memory by that library.

    `paths` are such folders. A dataset's selection and order hold. What lies on the Hugging Face hub is parquet or JSON
    lines: `{name: parquet, paths: [hf://datasets/org/name]}`.
    """
    library = require("datasets", "datasets", "datasets")
    return build_corpus(_documents(options, context, library), context, deduplicate=options.deduplicate)


def _documents(options: DatasetsOptions, context: DataContext, library: Any) -> Iterator[Document]:
    records = Records(options, context.account)
    for path in options.paths:
        folder = context.find(path)
        for split, table in _splits(folder, options.split, library).items():
            where = f"{folder} ({split})" if split else str(folder)
            check_columns(table.column_names, options, where)
            batches = table.with_format(None).select_columns(options.keys).iter(batch_size=ROWS)
            name = f"{folder_name(folder)}/{split}" if split else folder_name(folder)
            domain = split or folder_name(folder)
            yield from records.rows(batches, lambda row, where=where: f"{where}: row {row}", name, domain)  # type: ignore[misc]


def _splits(folder: Path, wanted: str | None, library: Any) -> dict[str, Any]:
    """{split: table}; of a folder that holds a single table {"": table}."""
    try:
        found = library.load_from_disk(str(folder), keep_in_memory=False)
    except Exception as error:  # the library raises what its parts raise: FileNotFoundError, ArrowInvalid, KeyError
        raise DataError(
            f"data.source: {folder} can't be read as a saved dataset ({type(error).__name__}: {error}); give the "
            "folder that `save_to_disk` wrote"
        ) from error
    splits = dict(found) if isinstance(found, dict) else {"": found}
    if wanted is None:
        return splits
    if wanted not in splits:
        raise DataError(f"data.source: {folder} has no split '{wanted}'; it has: {', '.join(splits) or 'one table'}")
    return {wanted: splits[wanted]}


@hookimpl
def moelab_data_sources() -> list[Component[DataContext, Corpus]]:
    return [component("datasets", DatasetsOptions, datasets)]
