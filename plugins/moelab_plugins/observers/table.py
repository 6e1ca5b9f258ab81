"""Writes a run's numbers as one table, CSV or Parquet, for a spreadsheet, pandas, Polars, DuckDB or R."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab import Component, component, hookimpl
from moelab.atomic import write_file
from moelab.printable import printable
from moelab.safe_files import Reading, json_lines
from moelab_plugins.observers._tracked import plain, require

LOG, ALARMS = "metrics.jsonl", "alarms"
FIRST = ("step", "tokens", "flops", "seconds")  # columns
READING = Reading(cure="the table is made of its lines")
CSV, PARQUET = "csv", "parquet"


@dataclass
class TableOptions:
    format: str = CSV  # csv, or parquet (pip install 'moelab[parquet]')

    def __post_init__(self) -> None:
        if self.format not in (CSV, PARQUET):
            raise ValueError(f"format: must be {CSV} or {PARQUET}, not '{self.format}'")


class TableObserver:
    """`metrics.csv` or `metrics.parquet` in the run folder: a row a step, a column a metric, `alarms` last.

    Made anew of metrics.jsonl at each checkpoint and at the end, so that a resumed run's table has each step once.
    Parquet's metadata holds `config`, `facts` and `summary` as JSON.
    """

    def __init__(self, options: TableOptions, run_dir: Path) -> None:
        if options.format == PARQUET:
            require("pyarrow", PARQUET)
        self.options, self.run_dir = options, run_dir
        self.about: dict[str, Any] = {}  # what Parquet's metadata holds

    def on_train_begin(self, run_dir: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        self.run_dir, self.about = run_dir, {"config": config, "facts": facts}

    def on_save(self, step: int) -> None:
        self._write()

    def on_train_end(self, step: int, summary: Mapping[str, Any], error: BaseException | None) -> None:
        self.about["summary"] = summary
        if (self.run_dir / LOG).is_file():  # else the run failed before it began
            self._write()

    def _write(self) -> None:
        columns = table(self.run_dir / LOG)
        path = self.run_dir / f"metrics.{self.options.format}"
        write_file(path, _csv(columns) if self.options.format == CSV else _parquet(columns, self.about))


def table(path: Path) -> dict[str, list[Any]]:
    """metrics.jsonl -> {column: a value a step}, None where a step has none; lines of one step are one row."""
    rows: dict[int, dict[str, Any]] = {}
    for _, row in json_lines(path, READING, finite=False):
        rows.setdefault(row["step"], {}).update(row)
    found = dict.fromkeys(key for row in rows.values() for key in row)
    names = [*(key for key in FIRST if key in found), *(key for key in found if key not in (*FIRST, ALARMS))]
    columns = {name: [row.get(name) for row in rows.values()] for name in names}
    return columns | {ALARMS: [_alarms(row.get(ALARMS, ())) for row in rows.values()]}


def _alarms(alarms: Any) -> str:
    """ "dead_experts layer 3, overload layer 3": those that were on."""
    where = ["" if alarm.get("layer") is None else f" layer {alarm['layer']}" for alarm in alarms]
    return printable(", ".join(f"{alarm['name']}{place}" for alarm, place in zip(alarms, where, strict=True)))


def _csv(columns: Mapping[str, list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def _parquet(columns: Mapping[str, list[Any]], about: Mapping[str, Any]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    arrays = {name: pyarrow.array(values) for name, values in columns.items()}
    metadata = {key: json.dumps(plain(value)) for key, value in about.items()}
    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(arrays).replace_schema_metadata(metadata), buffer)
    return bytes(buffer.getvalue())


@hookimpl
def moelab_observers() -> list[Component[Path, object]]:
    return [component("table", TableOptions, TableObserver)]
