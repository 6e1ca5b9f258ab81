"""The folder of a run: made whole or not at all, never overwritten unasked."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moelab.atomic import discard, partial, recover, recover_all, write_file
from moelab.checkpoint import BEST, CHECKPOINTS, CONFIG
from moelab.errors import DataError, UserError
from moelab.lock import LOCK
from moelab.printable import printable
from moelab.records import Record
from moelab.safe_files import Reading, an_object, parse_json, read_bytes, read_object
from moelab.training.format import COUNTERS, METRICS, ROW_ALARMS, SUMMARY

WRITABLE = ".writable"  # made and removed to see that files can be
READING = Reading(UserError, "mend it, or begin anew with --force")
LONGEST_LOGGED = 10_000  # characters of one entry of log.txt: a traceback fits
logger = logging.getLogger("moelab")
LOG, DOCUMENTS, SAMPLES = "log.txt", "evaluation_documents.jsonl", "evaluation_samples.jsonl"


def prepare_run_folder(path: Path, *, resume: bool, force: bool) -> None:
    """Make `path` ready for a run.

    Raises UserError when it holds something and neither `resume` nor `force` was given, when it can't be
    written, or when `force` would delete what is no run folder. Of a run that is resumed, what a kill left of a
    checkpoint half written or half deleted goes.
    """
    try:
        holds = sorted(item.name for item in path.iterdir() if item.name != LOCK) if path.exists() else []
        if holds and not resume:
            if not force:
                raise UserError(
                    f"run_dir: {path} already holds a run; choose another run_dir, go on with --resume, "
                    "or replace it with --force"
                )
            if not _is_run(holds):
                raise UserError(f"run_dir: {path} is not a run folder; --force will not delete it")
            _empty(path, holds)
        recover_all(path / CHECKPOINTS)
        recover(path / BEST)
        path.mkdir(parents=True, exist_ok=True)
        probe = path / WRITABLE
        probe.touch()
        probe.unlink()
    except NotADirectoryError as error:
        raise UserError(f"run_dir: {path}: {error.strerror}; choose another run_dir") from error
    except OSError as error:
        raise UserError(f"run_dir: {path} can't be written: {error.strerror}; choose another run_dir") from error


def _is_run(names: list[str]) -> bool:
    """Also one that was killed before its first file stood, or when all but these had been deleted."""
    first = {LOG, WRITABLE, partial(Path(CONFIG)).name}
    return CONFIG in names or METRICS in names or first.issuperset(names)


def _empty(path: Path, names: list[str]) -> None:
    """Delete these, but not the lock; config.yaml last, so that what is left of it is still known as a run folder."""
    for name in sorted(names, key=lambda name: name in (CONFIG, METRICS)):
        item = path / name
        if item.is_dir() and not item.is_symlink():
            discard(item)
        else:
            item.unlink()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_file(path, json.dumps(value, indent=2, allow_nan=True) + "\n")


def is_finished(path: Path) -> bool:
    """Whether the run came to its end: its summary, written last, says so."""
    try:
        return bool(read_object(path / SUMMARY, READING, finite=False).get("status") == "finished")
    except UserError:
        return False


def forget_results(path: Path) -> None:
    """Remove what a run that had finished, and goes on, says of its end: the summary, which says that it did, first."""
    if is_finished(path):
        for name in (SUMMARY, DOCUMENTS, SAMPLES):
            (path / name).unlink(missing_ok=True)


class MetricsLog:
    """metrics.jsonl: one object a line. A resumed run first drops the lines after its checkpoint, None: all of them.

    A line that is there already, same step and same tags, is not written twice: the last evaluation comes after
    the last step, and a run killed behind it evaluates again. `newest` is the last value of each tag, a resumed run's
    as if it had never been killed.
    """

    def __init__(self, path: Path, resumed_step: int | None) -> None:
        self.path = path
        self.newest: dict[str, float] = {}
        self._seen: set[tuple[int, frozenset[str]]] = set()
        kept: list[dict[str, Any]] = []
        if path.exists() and resumed_step is not None:
            kept = [row for row in _readable(path) if row["step"] <= resumed_step]
        for row in kept:
            self._take(row)
        write_file(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")
        self._broken = False

    def holds(self, step: int, tag: str) -> bool:
        """Whether an earlier process wrote a line of this step with this tag."""
        return any(at == step and tag in tags for at, tags in self._seen)

    def write(self, row: Mapping[str, Any]) -> None:
        if _kind(row) in self._seen:
            return
        self._take(row)
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            self._broken = True  # what is left in the buffer would fail again when the file is closed
            error.filename = str(self.path)
            raise

    def _take(self, row: Mapping[str, Any]) -> None:
        self._seen.add(_kind(row))
        if row["step"] > 0:  # what a run begins with is no result of it
            self.newest |= {tag: value for tag, value in row.items() if tag not in (*COUNTERS, ROW_ALARMS)}

    def close(self) -> None:
        with contextlib.suppress(*([OSError] if self._broken else [])):
            self._file.close()


def _readable(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; of a damaged one those that can be read, and a word of the others.

    A last line cut short by a kill goes without a word: it comes again.
    """
    rows, lost = [], []
    *lines, torn = read_bytes(path, READING).split(b"\n")
    for number, line in enumerate([*lines, torn], 1):
        where = f"{path}:{number}"
        try:
            row = an_object(parse_json(line, where, READING, finite=False), where, READING)
            Record(where, row, READING).integer("step")
            rows.append(row)
        except UserError as error:
            lost += [error] if number <= len(lines) else []
    if lost:
        logger.warning("%d lines of %s can't be read and are left out: %s", len(lost), path, lost[0])
    return rows


def _kind(row: Mapping[str, Any]) -> tuple[int, frozenset[str]]:
    return row["step"], frozenset(row)


class HeldLog(logging.Handler):
    """Keeps what is said while a run is built, until it has a folder and a log, in the place of who would tell it.

    They, or the terminal where nobody has set logging up, hear it at the end: with another error than the data's it is
    beside the point, and that error is the one line to be read.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []
        self._tellers: list[logging.Handler] = []

    def __enter__(self) -> HeldLog:
        logger = logging.getLogger("moelab")
        self._tellers, logger.handlers = logger.handlers, [self]
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        logging.getLogger("moelab").handlers = self._tellers
        if kind is not None and not issubclass(kind, DataError):
            return
        last_resort = [] if logging.getLogger().handlers else [logging.lastResort]  # the root's have heard it already
        for teller in self._tellers or last_resort:
            for record in self.records:
                if teller is not None and record.levelno >= teller.level:
                    teller.handle(record)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class PrintableFormatter(logging.Formatter):
    """What is logged may quote names of strangers; tracebacks keep their lines."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), LONGEST_LOGGED, keep="\n")


class _LogFile(logging.FileHandler):
    """log.txt. When it can't be written, a full disk say, that is told once in its place, and the run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        logger = logging.getLogger("moelab")
        if self in logger.handlers:
            logger.removeHandler(self)
            logger.warning("%s can't be written: %s; the run goes on without it", self.baseFilename, sys.exc_info()[1])


def open_log(path: Path, held: Iterable[logging.LogRecord] = ()) -> logging.Handler:
    """What was `held` and everything that `moelab` logs from here go to log.txt; -> a handler for `close_log`."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path}: is no regular file of this folder; remove it, and what the run says is written there")
    handler = _LogFile(path)
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
    for record in held:
        handler.handle(record)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    return handler


def close_log(handler: logging.Handler) -> None:
    logging.getLogger("moelab").removeHandler(handler)
    with contextlib.suppress(OSError):  # told when it was written
        handler.close()
