"""A data source: one column of a CSV file, a row a document."""

from __future__ import annotations

import csv
from dataclasses import dataclass

import moelab


@dataclass
class Options:
    file: str = "???"  # must be given; looked for beside the config and in the current folder
    column: str = "text"
    domain: str = "csv"


def my_data_source(options: Options, context: moelab.DataContext) -> moelab.Corpus:
    """One column of a CSV file; `build_corpus` drops what repeats, splits and tokenises."""
    path = context.find(options.file)
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if options.column not in (rows.fieldnames or ()):
            raise moelab.ConfigError(
                f"column: {path} has none '{options.column}', but {', '.join(rows.fieldnames or ())}"
            )
        texts = [row[options.column] or "" for row in rows]
    documents = [moelab.Document(text, options.domain, f"{path.name}:{number}") for number, text in enumerate(texts, 2)]
    return moelab.build_corpus(documents, context)


@moelab.hookimpl
def moelab_data_sources() -> list[moelab.Component]:
    return [moelab.component("my_data_source", Options, my_data_source)]
