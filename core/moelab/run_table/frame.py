"""Run folders from Python: `moelab.run_records` needs nothing, `moelab.runs` makes a pandas DataFrame of the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from moelab.config.differing import differing
from moelab.errors import UserError
from moelab.run_table.found import find_runs
from moelab.run_table.record import RunRecord, read_record_of
from moelab.run_table.selection import select, sort

if TYPE_CHECKING:
    import pandas

Place = str | os.PathLike[str]


def run_records(
    *places: Place, where: Sequence[str] = (), sort_by: str | None = None, reverse: bool = False
) -> list[RunRecord]:
    """The runs in `places` (run folders, folders that hold some, patterns; none: "runs"), as `moelab runs` reads them.

    `where`: conditions that all must hold, `"state=running"` or `"model.moe.router.name=switch"`. `sort_by`: a field of
    RunRecord, `"age"`, or a key of the config; else in order of their places.
    Raises UserError for a place that is not there, or a key that no run has. A damaged folder is a record that says so.
    """
    records = select([read_record_of(folder) for folder in find_runs(places or ("runs",))], where)
    return records if sort_by is None else sort(records, sort_by, reverse=reverse)


def runs(
    *places: Place, where: Sequence[str] = (), sort_by: str | None = None, reverse: bool = False
) -> pandas.DataFrame:
    """`run_records(...)` as a pandas DataFrame: a row for each run, its fields, and a column for each key that differs.

    `updated` is a time in UTC, `alarms` a text, `config` the whole config as a mapping. A cell of a key that a run's
    config does not have is None. Raises UserError where pandas is not installed, and as `run_records` does.
    """
    try:
        import pandas  # noqa: PLC0415  (an extra)
    except ModuleNotFoundError as error:
        raise UserError(
            "moelab.runs makes a pandas DataFrame, and pandas is not installed: pip install 'moelab[notebook]'; "
            "moelab.run_records(...) gives the same as a list of records without it"
        ) from error
    records = run_records(*places, where=where, sort_by=sort_by, reverse=reverse)
    differences = differing([record.config for record in records])
    keys = list(dict.fromkeys(key for one in differences for key in one))
    plain = [f.name for f in fields(RunRecord) if f.name not in ("alarms", "config", "updated", "path")]
    columns: dict[str, list[Any]] = {"path": [str(record.path) for record in records]}
    columns |= {name: [getattr(record, name) for record in records] for name in plain}
    columns["updated"] = [pandas.Timestamp(record.updated, unit="s", tz="UTC") for record in records]
    columns["alarms"] = [alarm_words(record) for record in records]
    columns |= {key: [one.get(key) for one in differences] for key in keys}
    columns["config"] = [record.config for record in records]
    return pandas.DataFrame(columns)


def alarm_words(record: RunRecord) -> str:
    """The alarms that are on, each with its layers: `dead_fraction in layers 0, 3`; "" for none."""
    layers: dict[str, list[int]] = {}
    for name, layer in record.alarms:
        layers.setdefault(name, []).extend([] if layer is None else [layer])
    return "; ".join(
        f"{name} in layer{'s' if len(at) > 1 else ''} {', '.join(map(str, sorted(at)))}" if at else name
        for name, at in layers.items()
    )
