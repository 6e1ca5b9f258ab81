"""Run folders: never overwritten unasked, never half a line."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
from pathlib import Path

import pytest

from moelab.atomic import write_file
from moelab.errors import DataError, UserError
from moelab.training.run_folder import (
    HeldLog,
    MetricsLog,
    close_log,
    is_finished,
    open_log,
    prepare_run_folder,
)
from moelab.training.run_lock import hold


def test_what_is_said_before_there_is_a_folder_reaches_the_terminal_and_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `moelab train`: nobody has set logging up, so warnings go to what logging calls its last resort."""
    shown: list[str] = []
    last = logging.Handler(logging.WARNING)
    last.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging, "lastResort", last)
    logger = logging.getLogger("moelab")
    with HeldLog() as held:
        logger.warning("early")
    close_log(open_log(tmp_path / "log.txt", held.records))
    assert shown == ["early"]
    for error, told in ((UserError("x"), ["early"]), (DataError("x"), ["early", "why"])):
        with contextlib.suppress(UserError), HeldLog():
            logger.warning("why")
            raise error
        assert shown == told
    assert "WARNING early" in (tmp_path / "log.txt").read_text()
    assert held not in logger.handlers


def test_an_empty_or_absent_folder_is_taken(tmp_path: Path) -> None:
    prepare_run_folder(tmp_path, resume=False, force=False)
    prepare_run_folder(tmp_path / "a" / "b", resume=False, force=False)
    assert (tmp_path / "a" / "b").is_dir()


def test_a_run_is_neither_overwritten_nor_touched(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"--resume.*--force"):
        prepare_run_folder(tmp_path, resume=False, force=False)
    prepare_run_folder(tmp_path, resume=True, force=False)
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_force_empties_a_run_folder_only(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    prepare_run_folder(tmp_path, resume=False, force=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not a run folder"):
        prepare_run_folder(tmp_path, resume=False, force=True)


@pytest.mark.parametrize("left", [["log.txt"], [".config.yaml.partial", "log.txt"], [".writable"]])
def test_force_takes_a_run_that_was_killed_before_its_first_file(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).touch()
    prepare_run_folder(tmp_path, resume=False, force=True)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        prepare_run_folder(tmp_path / "file", resume=False, force=False)


def test_writing_leaves_nothing_beside(tmp_path: Path) -> None:
    write_file(tmp_path / "x", "one")
    write_file(tmp_path / "x", "two")
    assert (tmp_path / "x").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_resumed_log_drops_later_lines_and_half_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"step": 4, "a"')
    log = MetricsLog(path, 2)
    log.write({"step": 3, "a": 30})
    log.close()
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 2, 30]


def test_a_line_that_is_there_is_not_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "a": 2}\n')
    log = MetricsLog(path, 2)
    log.write({"step": 2, "a": 2})
    log.write({"step": 2, "eval/loss": 1})
    log.close()
    assert len(path.read_text().splitlines()) == 2


def test_a_log_knows_the_newest_value_of_each_tag_also_of_lines_before_it_was_resumed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1, "b": 1}\n{"step": 2, "seconds": 0.5, "a": 2}\n{"step": 3, "a": 3}\n')
    log = MetricsLog(path, 2)
    assert log.newest == {"a": 2, "b": 1}
    log.write({"step": 3, "tokens": 7, "c": 3})
    log.close()
    assert log.newest == {"a": 2, "b": 1, "c": 3}


def test_a_run_that_begins_again_keeps_no_line(tmp_path: Path) -> None:
    """Killed before its first checkpoint: not even the lines of step 0 are its own."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": 1}\n')
    log = MetricsLog(path, None)
    log.close()
    assert log.newest == {}
    assert path.read_text() == ""


def test_what_a_kill_left_of_a_checkpoint_goes_when_the_run_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step_00000004.partial").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000002").mkdir()
    prepare_run_folder(tmp_path, resume=True, force=False)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_run_is_finished_when_its_summary_says_so(tmp_path: Path) -> None:
    assert not is_finished(tmp_path)
    (tmp_path / "summary.json").write_text('{"status": "failed"}')
    assert not is_finished(tmp_path)
    (tmp_path / "summary.json").write_text('{"status": "finished"}')
    assert is_finished(tmp_path)


def _full(*rest: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_cannot_be_written_is_told_once_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = open_log(tmp_path / "log.txt")
    logger = logging.getLogger("moelab")
    assert isinstance(handler, logging.FileHandler)
    handler.setStream(_Full())  # type: ignore[arg-type]
    for number in range(3):
        logger.info("line %d", number)
    close_log(handler)
    told = [message for message in caplog.messages if "can't be written" in message]
    assert len(told) == 1
    assert told[0].endswith("log.txt can't be written: [Errno 28] No space left on device; the run goes on without it")
    assert "Traceback" not in capfd.readouterr().err


class _Full(io.StringIO):
    write = flush = close = _full  # type: ignore[assignment]


def test_metrics_that_cannot_be_written_name_their_file_and_closing_them_hides_nothing(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path / "metrics.jsonl", 0)
    metrics._file = _Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
        metrics.write({"step": 1})
    metrics.close()


def test_a_file_that_cannot_be_written_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", _full)
    with pytest.raises(OSError, match="summary"):
        write_file(tmp_path / "summary.json", "{}")
    assert not list(tmp_path.iterdir())


def test_lines_of_metrics_that_can_not_be_read_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[1]\n{"x": 2}\n{"step": "x"}\n{"step": 2, "a": NaN}\n{"step": 3')
    MetricsLog(path, 5).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2, "a": NaN}\n'
    assert "3 lines of" in caplog.text


def test_nothing_is_written_through_a_link_that_lies_in_a_run_folder(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    for name in (".lock", "log.txt", ".summary.json.partial"):
        (run / name).symlink_to(other)
    with pytest.raises(UserError, match="can't be written"), hold(run):
        pass
    with pytest.raises(UserError, match="no regular file"):
        open_log(run / "log.txt")
    with pytest.raises(OSError, match="symbolic link"):
        write_file(run / "summary.json", "x")
    assert other.read_text() == "mine"


def test_a_folder_in_a_files_place_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(UserError, match=r"summary\.json: is a folder"):
        write_file(tmp_path / "summary.json", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
