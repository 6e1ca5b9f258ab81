"""One run folder as a record: how it stands, how far it is, what it reached. Torch is not needed.

The state is derived from what lies there, and from nothing else (`state_of`). Whatever can't be read is told in
`problem`, and the fields that hang on it are None: one damaged folder hides no other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelab.config.run import RunConfig
from moelab.config.scalars import settle
from moelab.config.stored import filled, read_stored_tree
from moelab.errors import UserError
from moelab.lock import LOCK, is_held
from moelab.printable import printable
from moelab.records import Record, read_record
from moelab.run_table.found import CONFIG
from moelab.safe_files import Reading, an_object, lines_from_end, parse_json
from moelab.training.format import FORMAT_VERSION, METRICS, ROW_ALARMS, SUMMARY

READING = Reading(UserError, "leave this run out, or train it again")
LOSS, BITS = "eval/loss", "eval/bits_per_byte"
RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
KILLED, UNFINISHED, DAMAGED = "killed", "unfinished", "damaged"
STATES = (RUNNING, FINISHED, STOPPED, FAILED, KILLED, UNFINISHED, DAMAGED)
_STATE_OF = {"finished": FINISHED, "interrupted": STOPPED, "failed": FAILED}  # summary.json's `status`
NOTHING = Record(METRICS, {}, READING)
LONGEST_NAME, MOST_METRICS = 200, 1 << 25  # characters; bytes of metrics.jsonl, from its end


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says of itself; None: it does not say. `loss` and `bits_per_byte` are of held-out text."""

    path: Path
    name: str
    state: str  # one of STATES
    step: int | None = None  # the last one that was written down
    steps: int | None = None  # how many it is to take
    loss: float | None = None  # nats a token, of the last evaluation after step 0
    bits_per_byte: float | None = None
    evaluated_at: int | None = None  # the step of that evaluation
    tokens: float | None = None
    flops: float | None = None  # served
    seconds: float | None = None  # of training steps
    updated: float = 0.0  # seconds since 1970: when it last wrote
    alarms: tuple[tuple[str, int | None], ...] = ()  # (name, layer) of those that are on
    error: str | None = None  # why it failed
    config: Mapping[str, Any] = field(default_factory=dict)  # as the run stored it
    problem: str | None = None  # what of the folder can't be read


def read_record_of(folder: Path) -> RunRecord:
    """The record of one run folder. Raises nothing for what is wrong with the folder: it says so."""
    problems: list[str] = []
    config = _tried(_read_config, folder / CONFIG, problems) or {}
    summary = _tried(_read_summary, folder / SUMMARY, problems)
    rows = _tried(_read_rows, folder / METRICS, problems) or _Rows()
    try:
        state = DAMAGED if problems else state_of(folder, summary)
        ended = summary if summary is not None and state in _STATE_OF.values() else Record(SUMMARY, {}, READING)
        return RunRecord(
            path=folder,
            name=printable(ended.text("name", None) or config.get("name") or folder.resolve().name, LONGEST_NAME),
            state=state,
            updated=_updated(folder),
            config=config,
            problem="; ".join(problems) or None,
            **_progress(config, ended, rows),
        )
    except UserError as error:
        name = printable(folder.resolve().name, LONGEST_NAME)
        return RunRecord(folder, name, DAMAGED, updated=_updated(folder), config=config, problem=str(error))


def state_of(folder: Path, summary: Record | None) -> str:
    """`running` while a living process holds the lock; else what summary.json says; else what is left of it.

    The lock goes with the end of a run, and stays behind one that was killed. Its process touches it while it lives,
    and writes the summary after that: an older summary is of an earlier process, which this one went on from.
    `unfinished`: neither lock nor summary, as in a folder that was copied from a run under way.
    """
    lock = folder / LOCK
    if is_held(lock):
        return RUNNING
    left = _changed(lock)
    if summary is not None and (left is None or (_changed(folder / SUMMARY) or 0.0) >= left):
        return _STATE_OF.get(summary.text("status"), UNFINISHED)
    return UNFINISHED if left is None else KILLED


def _progress(config: Mapping[str, Any], ended: Record, rows: _Rows) -> dict[str, Any]:
    """The fields that say how far the run is and what it reached: of the last rows, else of its summary."""
    last, evaluated, logged = rows.last, rows.evaluated, rows.logged
    final = ended.record("final", optional=True)
    train = Record(CONFIG, config, READING).record("train", optional=True)
    alarms = ended.listed("alarms", dict, optional=True) if "alarms" in ended else None
    if alarms is not None:
        on = [_alarm(Record(SUMMARY, alarm, READING)) for alarm in alarms if alarm.get("on")]
    else:
        on = [_alarm(Record(METRICS, alarm, READING)) for alarm in logged.listed(ROW_ALARMS, dict, optional=True)]
    return {
        "step": ended.integer("steps", None, least=0) if "steps" in ended else last.integer("step", None, least=0),
        "steps": train.integer("steps", None) if isinstance(train.values.get("steps"), int) else None,
        "loss": _finite_or_nan(evaluated if LOSS in evaluated else final, LOSS),
        "bits_per_byte": _finite_or_nan(evaluated if LOSS in evaluated else final, BITS),
        "evaluated_at": evaluated.integer("step", None, least=0),
        "tokens": last.number("tokens", ended.number("tokens", None, least=0), least=0),
        "flops": last.number("flops", ended.number("flops", None, least=0), least=0),
        "seconds": last.number("seconds", ended.number("seconds", None, least=0), least=0),
        "alarms": tuple(dict.fromkeys(on)),
        "error": ended.text("error", None, longest=100_000),
    }


@dataclass(frozen=True)
class _Rows:
    """The ends of metrics.jsonl; empty records where there is no such line yet."""

    last: Record = NOTHING
    evaluated: Record = NOTHING  # the last evaluation after step 0
    logged: Record = NOTHING  # the last line of a training step


def _read_rows(path: Path) -> _Rows:
    """Only the lines that are wanted are parsed: a run's file may have a gigabyte."""
    found: dict[str, Record] = {}
    for line in lines_from_end(path, READING, MOST_METRICS):
        kinds = [kind for kind, sign in _SIGN_OF.items() if kind not in found and sign in line]
        if kinds:
            row = Record(str(path), an_object(parse_json(line, path, READING, finite=False), path, READING), READING)
            begun = row.integer("step", least=0) > 0  # what a run begins with is no result of it
            found |= {kind: row for kind in kinds if begun or kind == "last"}
        if len(found) == len(_SIGN_OF):
            break
    return _Rows(**found)


_SIGN_OF = {"last": b'"step"', "evaluated": f'"{LOSS}"'.encode(), "logged": b'"train/'}


def _read_config(path: Path) -> dict[str, Any]:
    config = dict(settle(read_stored_tree(path)))
    if not isinstance(config.get("model"), dict):
        READING.refuse(path, "holds no `model`")
    return filled(config, RunConfig)


def _read_summary(path: Path) -> Record:
    summary = read_record(path, READING, finite=False)
    version = summary.integer("format_version", 1)
    if version > FORMAT_VERSION:
        READING.refuse(path, f"has format_version {version}, and this moelab reads up to {FORMAT_VERSION}")
    return summary


def _tried(read: Any, path: Path, problems: list[str]) -> Any:
    """What `read` makes of a file; None, and a word of why, where it can't; None alone where there is no file."""
    if not os.path.lexists(path):
        return None
    try:
        return read(path)
    except UserError as error:
        problems.append(str(error))
        return None


def _alarm(record: Record) -> tuple[str, int | None]:
    return printable(record.text("name", longest=200)), record.integer("layer", None, least=0)


def _finite_or_nan(record: Record, key: str) -> float | None:
    """An endless loss is no number to compare with, as NaN is none."""
    value = record.number(key, None, finite=False)
    return value if value is None or math.isfinite(value) else math.nan


def _updated(folder: Path) -> float:
    return max((_changed(folder / name) or 0.0 for name in (CONFIG, METRICS, SUMMARY)), default=0.0)


def _changed(path: Path) -> float | None:
    """When a file was last written; None where there is none."""
    try:
        return path.stat(follow_symlinks=False).st_mtime
    except OSError:
        return None
