"""What is saved when a run ends: a whole state or none. When a run saves unasked: by the clock."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from moelab.config.model import ModelConfig
from moelab.config.run import RunConfig, TrainConfig
from moelab.errors import CheckpointError, RunFailure
from moelab.planning.memory import predict
from moelab.planning.traffic import Problem
from moelab.registry import Registry
from moelab.shortage import MEMORY, Shortage
from moelab.training import limits
from moelab.training.failure import NotFinite
from moelab.training.limits import check_disk, fitting, told, warn_of_disk
from moelab.training.rescue import State, ending, save_what_is_good
from moelab.training.save_clock import INTERVAL, SaveClock


def _saved(model: nn.Module, error: BaseException, whole: bool = True, fails: bool = False) -> bool:
    saved: list[bool] = []

    def save() -> None:
        if fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(True)

    save_what_is_good(model, torch.optim.SGD(model.parameters()), save, error, State(7, whole))
    return bool(saved)


def test_a_whole_state_is_saved_and_said(caplog: pytest.LogCaptureFixture) -> None:
    assert _saved(nn.Linear(2, 2), ValueError())
    assert caplog.messages == ["the state after step 7 is saved; --resume goes on from it"]


def test_after_a_nan_the_same_run_would_meet_it_again(caplog: pytest.LogCaptureFixture) -> None:
    assert _saved(nn.Linear(2, 2), NotFinite("x"))
    assert "by train.init_from" in caplog.messages[0]


def test_half_an_update_is_not_saved(caplog: pytest.LogCaptureFixture) -> None:
    assert not _saved(nn.Linear(2, 2), ValueError(), whole=False)
    assert "not saved, because of an update that was under way; earlier checkpoints stand" in caplog.messages[0]


def test_a_parameter_that_is_no_number_is_not_saved(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.bias, float("nan"))
    assert not _saved(model, NotFinite("x"))
    assert "not saved, because of the parameter bias" in caplog.messages[0]


def test_a_disk_that_is_full_too_does_not_hide_why_the_run_ended(caplog: pytest.LogCaptureFixture) -> None:
    assert not _saved(nn.Linear(2, 2), ValueError(), fails=True)
    assert "can't be saved either" in caplog.messages[0]
    assert not _saved(nn.Linear(2, 2), CheckpointError("that disk"))


def _config(**train: Any) -> RunConfig:
    model = ModelConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return RunConfig(run_dir="x", model=model, train=TrainConfig(steps=1, device="cpu", **train))


def test_a_shortage_is_one_line_with_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config, registry = _config(batch_size=64, sequence_length=256), Registry(entry_points=False)
    everything = predict(config.model, Problem(64, 256, device="cpu"), registry).memory.peak
    half = predict(config.model, Problem(32, 256, device="cpu"), registry).memory.peak
    monkeypatch.setattr(limits, "memory_there", lambda device: (everything + half) // 2)
    monkeypatch.setattr(limits, "ROOM", 1.0)
    line = told(Shortage(MEMORY, 1 << 30), config, registry)
    assert line.startswith("too little memory: 1.1 GB more were asked for; micro-batches of 64 x 256 tokens take about")
    assert ": train.micro_batch_size=32 would fit (" in line
    monkeypatch.setattr(limits, "memory_there", lambda device: 1000)
    assert "a smaller model would fit" in str(fitting(config, registry))


def test_an_ending_keeps_what_is_told_well_and_our_own_tracebacks() -> None:
    config, registry = _config(), Registry(entry_points=False)
    for error in (KeyboardInterrupt(), RunFailure("x"), CheckpointError("y"), ZeroDivisionError()):
        assert ending(error, config, registry, 3) is error
    failure = ending(MemoryError(), config, registry, 3)
    assert isinstance(failure, RunFailure)
    assert str(failure).startswith("step 3: too little memory")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 5000))
    check_disk(tmp_path / "not there yet", {"a": 3000, "b": 2000})
    with pytest.raises(CheckpointError, match=r"it takes 5\.0 kB, and 5\.0 kB are free on that disk"):
        check_disk(tmp_path, {"a": 3000, "b": 2001})
    warn_of_disk(tmp_path, nn.Linear(10, 10, bias=False), 2, 800)  # 3 checkpoints of 3 * 400 bytes
    assert not caplog.messages
    warn_of_disk(tmp_path, nn.Linear(20, 20, bias=False), 2, 3200)
    assert "3 checkpoints of 4.8 kB won't fit into the 5.0 kB that are free" in caplog.messages[0]


def test_the_clock_saves_every_quarter_of_an_hour_at_a_hundredth_of_the_time() -> None:
    time = [0.0]
    clock = SaveClock(now=lambda: time[0])
    time[0] = INTERVAL - 1
    assert not clock.due()
    time[0] = INTERVAL
    assert clock.due()
    with clock.saving():
        time[0] += 60
    time[0] += INTERVAL
    assert not clock.due(), "a save of a minute is made every 100 minutes"
    time[0] += 60 / 0.01 - INTERVAL
    assert clock.due()
