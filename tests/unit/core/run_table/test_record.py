"""What a run folder says of itself: its state from lock and summary, its numbers from the last rows."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moelab.run_table.found import find_runs
from moelab.run_table.record import read_record_of
from moelab.training.run_lock import hold
from run_folders import finished_run, kill_holder, make_older, row, write_run

EVAL = {"eval/loss": 3.0, "eval/bits_per_byte": 4.0}


def test_a_run_whose_process_lives_is_running_whatever_an_earlier_summary_says(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "a", rows=[row(10, {"train/loss": 1.0})], summary={"status": "interrupted", "steps": 5}
    )
    with hold(folder):
        record = read_record_of(folder)
    assert (record.state, record.step, record.steps) == ("running", 10, 30)
    assert read_record_of(folder).state == "stopped"


def test_looking_does_not_take_the_lock(tmp_path: Path) -> None:
    """A run that begins while somebody looks is not turned away, and one that is looked at keeps its lock."""
    folder = write_run(tmp_path / "a", rows=[row(10, {})])
    with hold(folder):
        before = (folder / ".lock").read_bytes()
        read_record_of(folder)
        assert (folder / ".lock").read_bytes() == before
    assert sorted(item.name for item in folder.iterdir()) == ["config.yaml", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("status", "state"),
    [("finished", "finished"), ("interrupted", "stopped"), ("failed", "failed"), ("new", "unfinished")],
)
def test_an_ended_run_is_as_its_summary_says(tmp_path: Path, status: str, state: str) -> None:
    folder = write_run(tmp_path / "a", rows=[row(7, {})], summary={"status": status, "steps": 7, "error": "E: why"})
    assert (read_record_of(folder).state, read_record_of(folder).step) == (state, 7)
    assert read_record_of(folder).error == (None if state == "unfinished" else "E: why")


def test_a_run_that_died_without_a_word_is_killed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", rows=[row(7, {})])
    kill_holder(folder)
    assert read_record_of(folder).state == "killed"


def test_one_that_was_resumed_and_then_killed_is_killed_too(tmp_path: Path) -> None:
    """The summary of the process before is older than the lock of the one that was killed."""
    folder = write_run(tmp_path / "a", rows=[row(20, EVAL)], summary={"status": "interrupted", "steps": 10})
    make_older(folder / "summary.json", 60)
    kill_holder(folder)
    record = read_record_of(folder)
    assert (record.state, record.step, record.loss) == ("killed", 20, 3.0)
    os.utime(folder / "summary.json")  # written after the last sign of its process: the run had come to its end
    assert read_record_of(folder).state == "stopped"


def test_neither_lock_nor_summary_is_unfinished_and_no_more(tmp_path: Path) -> None:
    assert read_record_of(write_run(tmp_path / "a", rows=[row(7, {})])).state == "unfinished"


def test_of_another_machine_a_lock_that_is_touched_no_more_is_a_killed_runs(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", rows=[row(7, {})])
    lock = folder / ".lock"
    lock.write_text(json.dumps({"host": "elsewhere", "boot": "another", "pid": 1}))
    assert read_record_of(folder).state == "running"
    make_older(lock, 3600)
    assert read_record_of(folder).state == "killed"


def test_loss_is_the_last_one_on_held_out_text_after_the_start(tmp_path: Path) -> None:
    rows = [row(0, {"eval/loss": 9.0}), row(10, EVAL), *(row(step, {"train/loss": 1.0}) for step in range(11, 15))]
    record = read_record_of(write_run(tmp_path / "a", rows=rows))
    assert (record.loss, record.bits_per_byte, record.evaluated_at, record.step) == (3.0, 4.0, 10, 14)
    assert (record.tokens, record.seconds) == (14 * 512, 7.0)
    new = read_record_of(write_run(tmp_path / "b", rows=rows[:1]))
    assert (new.loss, new.evaluated_at, new.step) == (None, None, 0)


def test_a_loss_that_is_no_number_is_not_passed_over(tmp_path: Path) -> None:
    rows = [row(10, EVAL), row(20, {"eval/loss": math.nan, "eval/bits_per_byte": math.inf})]
    record = read_record_of(write_run(tmp_path / "a", rows=rows))
    assert record.loss is not None
    assert record.bits_per_byte is not None
    assert math.isnan(record.loss)
    assert math.isnan(record.bits_per_byte)


def test_alarms_are_those_that_are_on(tmp_path: Path) -> None:
    on, off = {"name": "dead", "layer": 1, "on": True}, {"name": "over", "layer": None, "on": False}
    assert read_record_of(finished_run(tmp_path / "a", 3.0, alarms=[on, off])).alarms == (("dead", 1),)
    early, late = {"alarms": [{"name": "dead", "layer": 0, "value": 1.0}]}, {"train/loss": 1.0}
    running = write_run(tmp_path / "b", rows=[row(10, {"train/loss": 1.0, **early}), row(10, EVAL)])
    assert read_record_of(running).alarms == (("dead", 0),)
    over = write_run(tmp_path / "c", rows=[row(10, {"train/loss": 1.0, **early}), row(20, late)])
    assert read_record_of(over).alarms == ()


def test_a_line_that_is_just_being_written_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", rows=[row(10, EVAL)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "eval/lo')
    assert read_record_of(folder).step == 10


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", "model: [1, 2"), ("config.yaml", "seed: 1"), ("config.yaml", "model: {}\ntrain: 7"),
        ("summary.json", "{"), ("summary.json", '{"format_version": 99}'), ("summary.json", '{"status": 3}'),
        ("summary.json", '{"status": "finished", "final": []}'),
        ("summary.json", '{"status": "failed", "alarms": [1]}'),
        ("metrics.jsonl", '{"step": "x"}\n'), ("metrics.jsonl", '[{"step": 1}]\n'),
        ("metrics.jsonl", '{"step": 1, "x"}\n'),
        ("metrics.jsonl", '{"step": 3, "eval/loss": "low"}\n'), ("config.yaml", "- " * 100_000),
        ("config.yaml", "[" * 100_000),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_one_record_that_names_the_file(tmp_path: Path, file: str, content: str) -> None:
    folder = finished_run(tmp_path / "a", 3.0)
    (folder / file).write_text(content)
    record = read_record_of(folder)
    assert record.state == "damaged"
    assert file in (record.problem or "")


def test_nothing_in_a_strangers_folder_makes_it_wait(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "a", 3.0)
    for name in ("metrics.jsonl", "summary.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    os.mkfifo(folder / ".lock")
    assert "no regular file" in (read_record_of(folder).problem or "")


def test_many_runs_are_read_without_torch(tmp_path: Path) -> None:
    finished_run(tmp_path / "a", 3.0)
    code = (
        "import sys, moelab; found = moelab.run_records(sys.argv[1]); assert found[0].loss == 3.0; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    outcome = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_runs_are_found_at_any_depth_and_checkpoints_are_none(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / name, 3.0) for name in ("b", "a/deep/er", "a/c")]
    for state in ("state.json", "config.yaml"):
        inner = runs[0] / "checkpoints" / "step_00000030"
        inner.mkdir(parents=True, exist_ok=True)
        (inner / state).write_text("{}")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(finished_run(tmp_path.parent / f"{tmp_path.name}_elsewhere", 3.0))
    finished_run(tmp_path / ".x.partial", 3.0)
    found = [str(path.relative_to(tmp_path)) for path in find_runs([tmp_path])]
    assert found == ["b", "linked", "a/c", "a/deep/er"]
    assert find_runs([tmp_path, runs[0], f"{tmp_path}/*"]) == find_runs([tmp_path])
    away = tmp_path.parent / f"{tmp_path.name}_away"
    finished_run(away / "inside", 3.0)
    (tmp_path / "away").symlink_to(away)  # no run itself: followed where it is named
    assert len(find_runs([tmp_path])) == 4
    assert len(find_runs([tmp_path / "away"])) == 1
