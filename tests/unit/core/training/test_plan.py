"""A run that is given more steps than it was planned for: what its rate is then, and what is told."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moelab.config.run import RunConfig, ScheduleConfig
from moelab.errors import ConfigError
from moelab.training.plan import Plan
from moelab.training.schedule import learning_rate_factor
from moelab.training.trainer import train

CHECKPOINT = Path("runs/a/checkpoints/step_00000050")


def _plan(name: str, steps: int, **options: Any) -> Plan:
    return Plan(ScheduleConfig(name=name, **options), steps)


@pytest.mark.parametrize(
    ("plan", "step"),
    [
        (_plan("constant", 50), 50),
        (_plan("wsd", 50, decay_fraction=0.2), 40),  # the decay's first rate is that of step 40
        (_plan("cosine", 50, warmup_steps=10), 11),
        (_plan("cosine", 50, min_lr_ratio=1.0), 50),
        (_plan("cosine", 50), 0),
    ],
)
def test_a_run_whose_rates_were_those_of_the_longer_plan_goes_on_as_it(plan: Plan, step: int) -> None:
    longer = plan.changed(100, step, CHECKPOINT)
    assert [longer.factor(at) for at in range(100)] == [
        learning_rate_factor(plan.schedule, at, 100) for at in range(100)
    ]
    assert not longer.rewarmed
    assert "goes on as one" in longer.changes[0].sentence()


@pytest.mark.parametrize(
    ("plan", "step", "since"),
    [(_plan("wsd", 50, decay_fraction=0.2), 41, 40), (_plan("cosine", 50, warmup_steps=10), 12, 11)],
)
def test_a_rate_that_came_down_for_the_old_end_is_refused_with_the_ways_out(plan: Plan, step: int, since: int) -> None:
    with pytest.raises(ConfigError, match=rf"^train.steps: 100, .*since step {since} .*schedule.rewarm_steps=N .*wsd"):
        plan.changed(100, step, CHECKPOINT)
    with pytest.raises(ConfigError, match=r"train.steps: 30, and .* has done"):
        plan.changed(30, 41, CHECKPOINT)


def test_a_rewarmed_rate_rises_from_where_it_was_and_runs_through_its_schedule_once_more() -> None:
    plan = _plan("cosine", 50, min_lr_ratio=0.1, rewarm_steps=4).changed(101, 50, CHECKPOINT)
    assert plan.changes[0].factor == pytest.approx(0.1)
    rise = [0.1 + 0.9 * part for part in (0.2, 0.4, 0.6, 0.8)]
    assert [plan.factor(at) for at in range(50, 54)] == pytest.approx(rise)
    assert plan.factor(54) == pytest.approx(1.0)
    assert plan.factor(77) == pytest.approx(0.55), "half of the way from 54 to 100"
    assert plan.factor(100) == pytest.approx(0.1)
    assert "another recipe" in plan.changes[0].sentence()


def test_a_rewarmed_wsd_may_be_lengthened_again_before_its_new_decay() -> None:
    plan = _plan("wsd", 50, decay_fraction=0.2, rewarm_steps=0).changed(100, 50, CHECKPOINT)
    again = plan.changed(150, 80, CHECKPOINT)
    assert again.rewarmed == plan.changes
    assert [again.factor(at) for at in (50, 79, 129)] == [1.0, 1.0, 1.0]
    assert again.factor(149) == pytest.approx(0.1)
    assert len(plan.changed(150, 95, CHECKPOINT).rewarmed) == 2


def test_rewarming_needs_room_and_a_later_end() -> None:
    plan = _plan("cosine", 50, rewarm_steps=20)
    with pytest.raises(ConfigError, match=r"schedule.rewarm_steps: 20 leave nothing of the 20 steps"):
        plan.changed(60, 40, CHECKPOINT)
    with pytest.raises(ConfigError, match=r"train.steps: 45"):
        plan.changed(45, 40, CHECKPOINT)


def _longer(config: RunConfig, steps: int, **schedule: Any) -> RunConfig:
    found = copy.deepcopy(config)
    found.train.steps, found.resume, found.schedule = steps, True, replace(config.schedule, **schedule)
    return found


def _weights(run: Path, step: int) -> list[bytes]:
    folder = run / "checkpoints" / f"step_{step:08d}"
    return [(folder / name).read_bytes() for name in ("model.safetensors", "training.safetensors")]


@pytest.mark.parametrize("name", ["constant", "wsd"])
def test_a_lengthened_run_is_bit_for_bit_the_one_that_was_planned_so(
    small_run: RunConfig, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Past its end under `constant`, from before its decay under `wsd`; stopped once more on the way."""
    small_run.schedule = ScheduleConfig(name=name, warmup_steps=1, decay_fraction=0.4)
    small_run.optimizer.lr = 1e-2
    first = 6 if name == "constant" else 4
    planned = copy.deepcopy(small_run)
    planned.run_dir, planned.train.steps = str(tmp_path / "planned"), 12
    train(planned)
    run = train(small_run)
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name[5:]) > first:
            for file in [*folder.iterdir()]:
                file.unlink()
            folder.rmdir()

    class Stop:
        def on_save(self, step: int) -> None:
            if step == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(_longer(small_run, 12), observers=[Stop()])
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert not (run / "evaluation_documents.jsonl").exists(), "what the old end left is no result of this run"
    train(_longer(small_run, 12))
    assert caplog.text.count(f"train.steps: 12, where 6 were planned, at step {first}: the rates so far are") == 1
    assert _weights(run, 12) == _weights(tmp_path / "planned", 12)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, tmp_path / "planned")]
    assert summaries[0]["final"]["eval/loss"] == summaries[1]["final"]["eval/loss"]
    assert [summary["tokens"] for summary in summaries] == [12 * 2 * 16] * 2
    assert [change["steps"] for change in summaries[0]["replanned"]] == [12]
    assert summaries[1]["replanned"] == []


def test_a_cosine_that_has_come_down_is_refused_and_the_folder_stays_as_it_was(small_run: RunConfig) -> None:
    run = train(small_run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"train.steps: 12, where .*step_00000006 was planned for 6"):
        train(_longer(small_run, 12))
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_rewarmed_run_takes_the_rates_that_were_told_and_resumes_exactly(
    small_run: RunConfig, tmp_path: Path
) -> None:
    runs = []
    for stopped in (False, True):
        config = copy.deepcopy(small_run)
        config.run_dir, config.train.log_every = str(tmp_path / f"stopped {stopped}"), 1
        run = train(config)
        if stopped:

            class Stop:
                def on_save(self, step: int) -> None:
                    if step == 8:
                        raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                train(_longer(config, 13, rewarm_steps=3), observers=[Stop()])
        train(_longer(config, 13, rewarm_steps=3))
        runs.append(run)
    assert _weights(runs[0], 13) == _weights(runs[1], 13)
    rows = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["train/lr"] for row in rows if "train/lr" in row}
    assert [rates[step] for step in (6, 7, 8, 9, 10, 13)] == pytest.approx(
        [1e-4, 1e-3 * 0.325, 1e-3 * 0.55, 1e-3 * 0.775, 1e-3, 1e-4]
    )
    [change] = json.loads((runs[1] / "summary.json").read_text())["replanned"]
    assert (change["step"], change["rewarm_steps"], change["factor"]) == (6, 3, pytest.approx(0.1))
