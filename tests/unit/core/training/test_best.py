"""The best checkpoint that is kept, and the run that ends when nothing better comes: off unless asked for."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

import moelab
from moelab.config.run import RunConfig, ScheduleConfig
from moelab.data.lineage import lineage_of
from moelab.errors import CheckpointError, ConfigError
from moelab.integrity import inspect
from moelab.training.best import Best
from moelab.training.plan import plan_of
from moelab.training.trainer import train


def test_the_lowest_loss_is_the_best_and_what_is_looked_at_twice_counts_once() -> None:
    best = Best()
    assert [best.look(step, loss) for step, loss in ((2, 3.0), (4, 2.0), (6, 2.0), (6, 1.0), (8, math.nan))] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert (best.step, best.loss, best.evaluations, best.since) == (4, 2.0, 4, 2)
    assert best.over(2)
    assert not best.over(3)
    assert not best.over(None)
    assert Best.of({"best_evaluation": best.to_json()}, None) == best


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """{step: held-out loss} that runs are told they have; set before a run, others are as they are."""
    told: dict[int, float] = {}
    look = Best.look

    def planted(best: Best, step: int, loss: float) -> bool:
        return look(best, step, told.get(step, loss))

    monkeypatch.setattr(Best, "look", planted)
    return told


def _summary(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "summary.json").read_text()))


def test_the_best_is_kept_whole_beside_the_newest_and_read_like_any_checkpoint(
    small_run: RunConfig, tmp_path: Path, losses: dict[int, float]
) -> None:
    losses |= {2: 3.0, 4: 2.0, 6: 2.5}
    small_run.train.keep_best = True
    run = train(small_run)
    finding = inspect(run / "best")
    assert finding.verifiable
    assert not finding.problems
    assert not finding.remarks
    assert (run / "best" / "model.safetensors").read_bytes() == (
        run / "checkpoints" / "step_00000004" / "model.safetensors"
    ).read_bytes()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    assert _summary(run)["best_evaluation"] == {
        "step": 4, "loss": 2.0, "evaluations": 3, "since": 1, "last": 6, "kept": True,
    }  # fmt: skip
    rows = [json.loads(line) for line in (run / "best" / "evaluation_documents.jsonl").read_text().splitlines()]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [at_four] = [row for row in logged if row["step"] == 4 and "eval/loss" in row]
    assert sum(r["nats"] for r in rows) / sum(r["tokens"] for r in rows) == pytest.approx(at_four["eval/loss"])
    best, last = (moelab.load(folder).state_dict() for folder in (run / "best", run))
    assert any(not best[name].equal(last[name]) for name in best)
    assert lineage_of(run / "best", "x").recipe != lineage_of(run / "checkpoints" / "step_00000006", "x").recipe


def test_nothing_of_it_happens_unasked(small_run: RunConfig, losses: dict[int, float]) -> None:
    losses |= {2: 1.0, 4: 2.0, 6: 3.0}
    run = train(small_run)
    assert not (run / "best").exists()
    assert (_summary(run)["steps"], _summary(run)["ended_early"]) == (6, None)


def test_a_run_ends_when_no_lower_loss_comes_and_goes_on_with_more_patience(
    small_run: RunConfig, losses: dict[int, float], caplog: pytest.LogCaptureFixture
) -> None:
    losses |= {2: 1.0, 4: 2.0, 6: 2.0}
    small_run.train.steps, small_run.train.patience = 10, 2
    run = train(small_run)
    assert "ended early at step 6 of 10: no lower held-out loss in 2 evaluations in a row since step 2" in caplog.text
    summary = _summary(run)
    assert (summary["status"], summary["steps"]) == ("finished", 6)
    assert summary["ended_early"] == {"planned": 10, "patience": 2}
    assert (run / "evaluation_documents.jsonl").is_file()
    small_run.resume = True
    before = (run / "metrics.jsonl").read_text()
    train(copy.deepcopy(small_run))
    assert "with a higher train.patience it goes on" in caplog.text
    assert (run / "metrics.jsonl").read_text() == before
    losses |= {8: 0.5}
    small_run.train.patience = 3
    train(small_run)
    assert (_summary(run)["steps"], _summary(run)["ended_early"]) == (10, None)


def test_a_stopped_run_finds_the_same_best_and_the_same_end(
    small_run: RunConfig, tmp_path: Path, losses: dict[int, float]
) -> None:
    losses |= {2: 4.0, 4: 1.0, 6: 2.0, 8: 3.0}
    small_run.train.steps, small_run.train.patience, small_run.train.keep_best = 12, 2, True
    stopped = copy.deepcopy(small_run)
    stopped.run_dir = str(tmp_path / "stopped")
    whole = train(small_run)

    class Stop:
        def on_evaluate(self, step: int) -> None:
            if step == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(copy.deepcopy(stopped), observers=[Stop()])
    stopped.resume = True
    run = train(stopped)
    for key in ("steps", "best_evaluation", "ended_early"):
        assert _summary(run)[key] == _summary(whole)[key], key
    assert _summary(run)["steps"] == 8
    assert (run / "best" / "model.safetensors").read_bytes() == (whole / "best" / "model.safetensors").read_bytes()


def test_a_best_checkpoint_that_is_not_the_lowest_before_a_resume_goes(
    small_run: RunConfig, losses: dict[int, float], caplog: pytest.LogCaptureFixture
) -> None:
    """A lengthened run begins before the step of the best it had kept, and goes another way from there."""
    losses |= {2: 3.0, 4: 2.0, 6: 1.0}
    small_run.train.keep_best, small_run.schedule.name, small_run.schedule.decay_fraction = True, "wsd", 0.4
    run = train(small_run)
    for file in [*(run / "checkpoints" / "step_00000006").iterdir()]:
        file.unlink()
    (run / "checkpoints" / "step_00000006").rmdir()
    losses |= {6: 2.0, 8: 1.9, 10: 5.0}
    small_run.train.steps, small_run.resume = 10, True
    train(small_run)
    assert "best held that of step 6, and the lowest held-out loss before step 4 was at step 4" in caplog.text
    assert json.loads((run / "best" / "state.json").read_text())["step"] == 8


def test_a_best_checkpoint_that_is_damaged_keeps_no_run_from_going_on(
    small_run: RunConfig, losses: dict[int, float], caplog: pytest.LogCaptureFixture
) -> None:
    losses |= {2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0}
    small_run.train.keep_best, small_run.schedule.name = True, "constant"
    run = train(small_run)
    (run / "best" / "state.json").write_text("{")
    small_run.train.steps, small_run.resume = 8, True
    train(small_run)
    assert "best/state.json" in caplog.text
    assert "the best is looked for from step 6 on" in caplog.text
    assert json.loads((run / "best" / "state.json").read_text())["step"] == 8


def test_a_state_that_holds_no_such_history_is_refused(tmp_path: Path) -> None:
    for found in ({"step": "x"}, {"loss": "low"}, 3):
        with pytest.raises(CheckpointError, match="best_evaluation"):
            Best.of({"best_evaluation": found}, tmp_path)
    schedule = ScheduleConfig()
    for found in ({"step": 1}, {"step": 1, "planned": 2, "steps": 3, "factor": "x"}, 3):
        with pytest.raises(CheckpointError, match="replanned"):
            plan_of(schedule, 5, {"replanned": [found]}, tmp_path)


@pytest.mark.parametrize("key", ["keep_best", "patience"])
def test_without_evaluations_on_the_way_there_is_nothing_to_wait_for(small_run: RunConfig, key: str) -> None:
    small_run.evaluation.every = 0
    setattr(small_run.train, key, 1)
    with pytest.raises(ConfigError, match=rf"^train\.{key}: .* set evaluation.every"):
        small_run.check()
