"""Reads a run folder; every missing or broken file is one message that names the file and the cure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from moelab.data.lineage import CONVERSION, TRAINING
from moelab.errors import ConfigError, UserError
from moelab.printable import printable
from moelab.records import Record, read_record
from moelab.safe_files import Reading, json_lines, read_bytes
from moelab.training.format import FORMAT_VERSION, NAMED_WEIGHTS
from moelab_tools.compare.run_shapes import check_config, check_summary

_CURE = "leave this run out, or train it again"
READING = Reading(UserError, _CURE)
LONGEST_NAME = 120  # characters of a run's name in tables and sentences
Row = dict[str, float]
AXES = ("step", "tokens", "flops", "seconds")  # in every line of metrics.jsonl, beside its tags


@dataclass(frozen=True)
class Document:
    """One held-out document as the final evaluation saw it."""

    domain: str
    nats: float
    tokens: int
    bytes: int | None  # None for data whose bytes are not known


@dataclass(frozen=True)
class Replicate:
    """The seeds of a run. Two runs of one recipe with equal ones are one sample; of two recipes, they are a pair."""

    seed: str  # of weights and noise
    order: str = ""  # of reading
    source: str | None = None  # of the training of the weights it starts from
    conversion: str | None = None  # of their upcycling

    def without(self, part: str) -> Replicate:
        """`part`: "source" or "conversion"."""
        return replace(self, source=None) if part == "source" else replace(self, conversion=None)

    def __str__(self) -> str:
        told = [self.seed if self.order in ("", self.seed) else f"{self.seed} (order {self.order})"]
        told += [f"source {self.source}"] * bool(self.source) + [f"conversion {self.conversion}"] * bool(
            self.conversion
        )
        return ", ".join(told)


@dataclass
class Run:
    """What a run folder tells. `name` is unique among the runs compared."""

    path: Path
    name: str
    status: str  # finished, failed, interrupted, or unfinished when there is no summary.json
    config: dict[str, Any]
    summary: dict[str, Any]
    rows: list[Row]
    documents: dict[str, Document]
    warnings: list[str] = field(default_factory=list)
    picked: int | None = None  # the step of its lowest evaluation, where that stands in place of the last one

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def counts_flops(self) -> bool:
        """Whether `flops` is what the run served. Without experts it always is; a run before format 2 did not count."""
        return not self.config["model"].get("moe") or all("flops_declared" in row for row in self.rows)

    @property
    def active_served(self) -> float | None:
        """Parameters that a token passed through, on average; all of them without experts."""
        parameters = self.summary.get("parameters", {})
        found = parameters.get("active_served") if self.config["model"].get("moe") else parameters.get("active")
        return None if found is None else float(found)

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")

    @property
    def order_seed(self) -> int | None:
        """What decided the order of reading; None in runs that don't say."""
        data = self.config.get("data") or {}
        return self.seed if data.get("order_seed") is None else data["order_seed"]

    @property
    def replicate(self) -> Replicate:
        """What two runs of one recipe may differ in."""
        stages = [*((self.summary.get("lineage") or {}).get("stages") or [])]
        stages += self.summary.get(NAMED_WEIGHTS, {}).get("stages", [])
        source, conversion = (
            _in_a_row([str(seeds) for stage, seeds in stages if stage == kind]) for kind in (TRAINING, CONVERSION)
        )
        return Replicate(str(self.seed), str(self.order_seed), source, conversion)

    def curve(self, tag: str, against: str = "tokens") -> tuple[list[float], list[float]]:
        """(x, y) of the rows that have a finite `tag`."""
        points = [(row[against], row[tag]) for row in self.rows if math.isfinite(row.get(tag, math.nan))]
        return [x for x, _ in points], [y for _, y in points]

    def final(self, tag: str) -> float | None:
        """From the summary, else the last one logged."""
        value = self.summary.get("final", {}).get(tag)
        if isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
        _, values = self.curve(tag)
        return values[-1] if values else None

    def amount(self, axis: str) -> float:
        """How many tokens, FLOPs or seconds the run took."""
        last = self.rows[-1][axis] if self.rows else 0.0
        return float(self.summary.get(axis) or last)


def _in_a_row(seeds: Sequence[str]) -> str | None:
    """`seed 0, order 1000 (4 times)`"""
    groups = [(one, len(list(same))) for one, same in groupby(seeds)]
    return ", ".join(one if count == 1 else f"{one} ({count} times)" for one, count in groups) or None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """All runs, in the order given, with names that tell them apart."""
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise UserError(f"{folder}: this run is given twice; name each run once")
        seen.add(folder.resolve())
    runs = [read_run(folder) for folder in folders]
    _rename_twins(runs, lambda run: f"{run.path.resolve().parent.name}/{run.path.resolve().name}")
    _rename_twins(runs, lambda run: str(run.path))
    return runs


def _rename_twins(runs: Sequence[Run], longer: Callable[[Run], str]) -> None:
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = printable(longer(run), LONGEST_NAME)


def read_run(folder: Path) -> Run:
    """One run folder, or a UserError that names the file and the cure."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; `moelab train` writes one to run_dir")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder, config.yaml is missing{_runs_inside(folder)}")
    config = _read_config(folder / "config.yaml")
    warnings: list[str] = []
    summary = _read_summary(folder / "summary.json")
    status = summary.get("status", "unfinished")
    rows = _read_metrics(folder / "metrics.jsonl", status == "finished", warnings)
    documents = read_documents(folder / "evaluation_documents.jsonl", status == "finished")
    name = summary.get("name") or config.get("name") or folder.resolve().name
    return Run(folder, printable(name, LONGEST_NAME), status, config, summary, rows, documents, warnings)


def _runs_inside(folder: Path) -> str:
    inside = sorted(child.parent.name for child in folder.glob("*/config.yaml"))
    if not inside:
        return "; give the run_dir of a `moelab train` run"
    return f"; it holds the runs {', '.join(inside)}: give {folder}/*"


def _read_config(path: Path) -> dict[str, Any]:
    from moelab.config.run import RunConfig
    from moelab.config.scalars import settle
    from moelab.config.stored import filled, read_stored_tree

    try:
        config = settle(read_stored_tree(path))
    except ConfigError as error:
        raise UserError(f"{error}; {_CURE}") from error
    if "model" not in config:
        raise UserError(f"{path}: holds no `model`; {_CURE}")
    check_config(Record(str(path), config, READING))
    return filled(config, RunConfig)


def _read_summary(path: Path) -> dict[str, Any]:
    """Empty when the run has not ended: it is written last."""
    if not path.exists():
        return {}
    summary = read_record(path, READING, finite=False)
    version = summary.integer("format_version", 1)
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path}: has format_version {version}, and this moelab reads up to {FORMAT_VERSION}: its names may mean "
            "something else; compare with the version that wrote it"
        )
    missing = [key for key in ("status", "final", "data", "parameters") if key not in summary]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; {_CURE}")
    check_summary(summary)
    return dict(summary.values)


def _read_metrics(path: Path, finished: bool, warnings: list[str]) -> list[Row]:
    """One row a step: train and eval lines of a step are merged, and repeated steps of a resumed run replaced."""
    if not path.exists():
        raise UserError(f"{path}: missing, so there are no curves; {_CURE}")
    rows: dict[float, Row] = {}
    for line in _lines(path, finished, warnings):
        absent = [axis for axis in AXES if axis not in line]
        if absent:
            raise UserError(f"{line.where}: lacks {', '.join(absent)}; {_CURE}")
        for axis in AXES:
            line.number(axis, least=0)
        step = line.number("step")
        while rows and next(reversed(rows)) > step:  # written again after a resume; what stays rises
            rows.popitem()
        row = rows.setdefault(step, {})
        row.update({key: float(value) for key, value in line.values.items() if isinstance(value, (int, float))})
    if finished and not rows:
        raise UserError(f"{path}: empty although the run finished; {_CURE}")
    return list(rows.values())


def read_documents(path: Path, finished: bool) -> dict[str, Document]:
    """By name; empty for a run that did not reach its final evaluation."""
    if not path.exists():
        if finished:
            raise UserError(f"{path}: missing, so the run can't be compared document by document; {_CURE}")
        return {}
    documents: dict[str, Document] = {}
    for line in _lines(path, finished, []):
        name = line.text("document")
        tokens, size = line.integer("tokens", least=1), line.integer("bytes", None, least=0)
        document = Document(line.text("domain"), line.number("nats"), tokens, size)
        if name in documents:
            raise UserError(f"{line.where}: document '{name}' stands here twice; {_CURE}")
        documents[name] = document
    if finished and not documents:
        raise UserError(f"{path}: holds no held-out text; {_CURE}")
    return documents


def _lines(path: Path, finished: bool, warnings: list[str]) -> list[Record]:
    """A torn last line is forgiven in a run that was killed while writing it."""
    lines = [Record(where, line, READING) for where, line in json_lines(path, READING, torn=not finished)]
    if lines and not finished and not read_bytes(path, READING).endswith(b"\n"):
        warnings.append(f"{path.name}: the last line is torn and was left out")
    return lines
