"""Runs that ended elsewhere than planned: what compare says of them, and when it goes by the best evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from moelab.errors import UserError
from moelab_tools.commands.compare import command
from moelab_tools.compare.comparison import compare
from moelab_tools.compare.endings import at_best
from moelab_tools.compare.runs import read_run, read_runs

MakeRun = Callable[..., Path]


def _say(run: Path, **facts: Any) -> Path:
    path = run / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    return run


def _change(rewarm: int | None) -> list[dict[str, Any]]:
    return [{"step": 200, "planned": 200, "steps": 300, "rewarm_steps": rewarm, "factor": 0.1}]


def _with_best(run: Path, step: int, loss: float) -> Path:
    """A best evaluation at `step`, in which every document cost half of what it cost at the end."""
    (run / "best").mkdir()
    rows = [json.loads(line) for line in (run / "evaluation_documents.jsonl").read_text().splitlines()]
    halved = [row | {"nats": row["nats"] / 2} for row in rows]
    (run / "best" / "evaluation_documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in halved))
    return _say(run, best_evaluation={"step": step, "loss": loss, "evaluations": 5, "since": 1, "kept": True})


def test_a_lengthened_run_is_one_recipe_with_a_planned_one_unless_its_rate_rose_again(make_run: MakeRun) -> None:
    planned = make_run("planned", seed=0)
    lengthened = _say(make_run("lengthened", seed=1), replanned=_change(None))
    rewarmed = _say(make_run("rewarmed", seed=2), replanned=_change(5))
    comparison = compare(read_runs([planned, lengthened, rewarmed]))
    assert sorted(sorted(line.runs) for line in comparison.lines) == [["lengthened", "planned"], ["rewarmed"]]
    text = "\n".join(comparison.warnings)
    assert "\nlengthened (200 to 300 at step 200): train.steps was changed on the way, and the rates are" in f"\n{text}"
    assert "rewarmed (200 to 300 at step 200) from 0.1 of optimizer.lr over 5 steps: train.steps was changed" in text
    assert "another recipe than so many steps planned from the start" in text
    assert "planned (" not in text


def test_a_run_that_ended_early_is_told_with_what_that_does_to_its_loss(make_run: MakeRun) -> None:
    ended = {"planned": 300, "patience": 2}
    early = [_say(make_run(f"early_{n}", steps=240, planned=300, seed=n), ended_early=ended) for n in (0, 1)]
    told = [line for line in compare(read_runs([*early, make_run("whole")])).warnings if "ended early" in line]
    place = "(at step 240 of 300, train.patience=2)"
    assert len(told) == 1
    assert all(f"{name} {place}" in told[0] for name in ("early_0", "early_1"))
    assert "the end was chosen by this held-out loss" in told[0]
    assert "whole" not in told[0]


def test_the_last_evaluation_counts_and_the_best_one_where_asked(make_run: MakeRun) -> None:
    runs = read_runs([_with_best(make_run(name), 120, 0.01) for name in ("a", "b")])
    last = compare(runs)
    assert any("0.0100 at step 120, the lowest of 5" in line and "--best" in line for line in last.warnings)
    best = compare([at_best(run) for run in runs])
    assert "too low by chance" in best.warnings[0]
    assert "a (step 120, of 5 looks)" in best.warnings[0]
    scores = [{line.name: line.score for line in one.lines} for one in (last, best)]
    assert scores[1] == pytest.approx({name: (value or 0.0) / 2 for name, value in scores[0].items()})
    at_120 = next(row["eval/loss"] for row in runs[0].rows if row["step"] == 120)
    assert at_best(runs[0]).final("eval/loss") == at_120


def test_a_run_that_kept_no_best_is_refused_by_name(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("plain")
    with pytest.raises(UserError, match=r"--best: .*plain kept no best checkpoint"):
        at_best(read_run(run))
    done = CliRunner().invoke(command, [str(run), "--best", "--output", str(tmp_path / "report")])
    assert isinstance(done.exception, UserError)
    assert not (tmp_path / "report").exists()
