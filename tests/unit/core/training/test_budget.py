"""A run within `train.memory_budget`: the same numbers whatever was chosen, and the same choice when it goes on."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path

import pytest

from moelab.checkpoint import read_run_config
from moelab.config.run import RunConfig
from moelab.errors import ConfigError
from moelab.planning.budget import Choice
from moelab.planning.memory import MemoryPlan
from moelab.training import budget as settled
from moelab.training.budget import tell_measured
from moelab.training.trainer import train

AMPLE = "100 TB"


def _losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def _least(run: RunConfig) -> str:
    """The smallest budget of this run, as the refusal of one byte names it."""
    run = copy.deepcopy(run)
    run.train.memory_budget, run.run_dir = "1", run.run_dir + "_none"
    with pytest.raises(ConfigError, match="the least is") as error:
        train(run)
    assert not Path(run.run_dir).exists()
    return str(error.value).split("the least is ")[1].split(" (")[0]


def test_whatever_was_chosen_the_losses_are_the_same_to_rounding(
    small_run: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run.train.batch_size = 8
    whole = train(small_run)
    small_run.run_dir, small_run.train.memory_budget = str(tmp_path / "small"), AMPLE
    plan = MemoryPlan(0, 0, 0, 0, 0, 0)
    monkeypatch.setattr(settled, "choose", lambda *_: Choice((1,), 1, True, plan, 2.0))
    caplog.clear()
    with caplog.at_level(logging.INFO, "moelab"):
        small = train(small_run)
    kept = read_run_config(small).train
    assert (kept.micro_batch_size, kept.activation_checkpointing, kept.recompute_logits) == (1, 1, True)
    assert _losses(small) == pytest.approx(_losses(whole), rel=1e-5)
    lines = [record.getMessage() for record in caplog.records if "memory_budget" in record.getMessage()]
    assert "1 of 8 sequences at a time" in lines[0]
    assert " taken up to step 2" in lines[1]
    assert len(lines) == 2


def test_a_resumed_run_keeps_the_choice_and_ends_in_the_same_bits(
    small_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run.train.memory_budget = _least(small_run)
    whole = train(small_run)
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step_00000006")
    small_run.run_dir, small_run.resume = str(stopped), True
    monkeypatch.setattr(settled, "choose", lambda *_: pytest.fail("chose again"))
    train(small_run)
    name = "checkpoints/step_00000006/model.safetensors"
    assert (stopped / name).read_bytes() == (whole / name).read_bytes()


def test_another_budget_is_no_way_to_go_on(small_run: RunConfig) -> None:
    small_run.train.memory_budget = AMPLE
    train(small_run)
    small_run.resume, small_run.train.memory_budget = True, "99 TB"
    with pytest.raises(ConfigError, match=r"train\.memory_budget: '100 TB' then, '99 TB' now"):
        train(small_run)


def test_more_than_the_budget_is_a_warning(small_run: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    small_run.train.memory_budget = "1 GB"
    with caplog.at_level(logging.INFO, "moelab"):
        told = None
        for gigabytes in (0.9, 0.95, 1.1, 1.2, 0.9):  # what a run takes grows for some steps
            told = tell_measured(small_run, None, gigabytes, 5, told)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "1.1 GB taken up to step 5; to stay below, begin a new run" in caplog.messages[1]
