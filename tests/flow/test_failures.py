"""A run that fails: told in one line, saved where its state is whole, and resumed to the bits of one that did not."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moelab.config.load import load_config
from moelab.config.run import RunConfig
from moelab.errors import ConfigError, RunFailure, UserError
from moelab.training import held_out, trainer
from moelab.training.trainer import train

PLUGIN = '''
from dataclasses import dataclass
import torch
import moelab

CALM = [False]


@dataclass
class Options:
    at: int = 5
    how: str = "raise"


def fail(how):
    if how == "raise":
        raise TypeError("no such thing")
    if how == "memory":
        torch.empty(1 << 53)


class Loss:
    """Fails in the given training step."""

    weight, needs_batch_counts = 0.1, False

    def __init__(self, options, context):
        self.options, self.step = options, 0

    def __call__(self, records, context):
        value = torch.stack([r.routing.scores.square().mean() for r in records]).mean()
        if self.step == self.options.at and not CALM[0]:
            fail(self.options.how)
            value = value * float("nan") if self.options.how == "nan" else value
        return value

    def after_step(self, context):
        self.step += 1
        if self.options.how == "after" and self.step == self.options.at and not CALM[0]:
            raise ValueError("after the update")

    def state_dict(self):
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state):
        self.step = int(state["step"])


class Observer:
    def __init__(self, options, run_dir):
        self.options = options

    def on_log(self, step):
        if step >= self.options.at:
            raise ConnectionError("the server is gone")


class Source:
    """Where a data source returns something else."""

    def __init__(self, options, context):
        pass


@moelab.hookimpl
def moelab_balance_losses():
    return [moelab.component("failing", Options, Loss)]


@moelab.hookimpl
def moelab_observers():
    return [moelab.component("failing", Options, Observer)]


@moelab.hookimpl
def moelab_data_sources():
    return [moelab.component("listing", Options, lambda options, context: [1, 2])]
'''
TIMES = {"seconds", "perf/tokens_per_second", "perf/mfu", "perf/memory_gb", "perf/data_share"}
NAME = "failing_lab"
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    (folder / f"{NAME}.py").write_text(PLUGIN)
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"Document {number} says {number**9} and {number**7}. " * 40)
    return folder


def _config(lab: Path, run: Path, *overrides: str) -> RunConfig:
    arguments = [
        "configs/train/tiny_moe.yaml", f"run_dir={run}", f"plugins=[{NAME}]", f"search_path=[{lab}]", "observers=[]",
        "train.steps=10", "train.batch_size=2", "train.sequence_length=32", "train.log_every=2", "train.threads=1",
        "evaluation.sequences=4", "evaluation.every=4", "evaluation.sample_tokens=0",
        f"data.source={{name: text, paths: [{lab}]}}", "model.moe.router.name=sigmoid_topk", *overrides,
    ]  # fmt: skip
    return load_config(arguments, RunConfig).config


def _failing(how: str, at: int = 5) -> str:
    return f"model.moe.balance_losses=[{{name: failing, how: {how}, at: {at}}}]"


def _metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def _same(run: Path, other: Path) -> None:
    for name in ("model.safetensors", "training.safetensors"):
        last = Path("checkpoints/step_00000010") / name
        assert (run / last).read_bytes() == (other / last).read_bytes(), name
    assert _metrics(run) == _metrics(other)


@pytest.fixture(scope="module")
def whole(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train(_config(lab, run, _failing("raise", at=99)))
    return run


def _resume(lab: Path, run: Path, *overrides: str) -> None:
    """The same config, whose plugin has been mended."""
    calm = sys.modules[NAME].CALM
    calm[0] = True
    try:
        train(_config(lab, run, *overrides, "resume=true"))
    finally:
        calm[0] = False


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            "raise",
            "step 5: model.moe.balance_losses.0: balance loss 'failing' of failing_lab: raised TypeError: no",
        ),
        ("nan", "NaN or Inf at step 5; it first appears in the value of failing. No update was made"),
        ("memory", "step 5: too little memory: 36,028.8 TB more were asked for"),
    ],
)
def test_a_run_that_fails_saves_its_last_step_and_resumes_to_the_same_bits(
    lab: Path, whole: Path, tmp_path: Path, how: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    with pytest.raises(RunFailure) as caught:
        train(_config(lab, run, _failing(how)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "the state after step 5 is saved" in caplog.text
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("failed", 5)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000005"]
    if how == "raise":
        _resume(lab, run, _failing(how))
        stored = json.loads((run / "summary.json").read_text())
        assert stored["status"] == "finished"
        _same(run, whole)


def test_half_an_update_is_not_saved(lab: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    with pytest.raises(RunFailure, match="raised ValueError: after the update"):
        train(_config(lab, run, _failing("after", at=6), "train.save_every=2"))
    assert "an update that was under way; earlier checkpoints stand" in caplog.text
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]


def test_a_run_that_fails_in_an_evaluation_makes_it_again(
    lab: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, evaluate = tmp_path / "run", held_out.evaluate

    def broken(model: Any, *rest: Any) -> Any:
        if (run / "metrics.jsonl").read_text().count("train/loss") == 2:  # after step 4
            raise ZeroDivisionError("ours")
        return evaluate(model, *rest)

    monkeypatch.setattr(held_out, "evaluate", broken)
    with pytest.raises(ZeroDivisionError):
        train(_config(lab, run, _failing("raise", at=99)))
    assert (run / "checkpoints" / "step_00000004").is_dir()
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    _resume(lab, run, _failing("raise", at=99))
    _same(run, whole)


def test_an_observer_that_raises_is_dropped_and_the_run_goes_on(
    lab: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    train(_config(lab, run, _failing("raise", at=99), "observers=[{name: failing, at: 4}]"))
    assert (
        caplog.text.count("observer 'failing' of failing_lab: raised ConnectionError: the server is gone in on_log")
        == 1
    )
    [dropped] = json.loads((run / "summary.json").read_text())["observers_dropped"]
    assert (dropped["observer"], dropped["step"]) == ("failing", 4)
    assert dropped["at"].startswith("failing_lab.py:")
    _same(run, whole)


def test_a_disk_that_is_full_ends_the_run_with_one_line(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of metrics.jsonl and of log.txt, which end differently: without its numbers a run is for nothing."""
    run = tmp_path / "run"

    def full(*rest: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full:
        def on_log(self, step: int) -> None:
            loop_files = [h for h in trainer.logger.handlers if getattr(h, "baseFilename", "").endswith("log.txt")]
            for handler in loop_files:
                monkeypatch.setattr(handler.stream, "write", full, raising=False)  # type: ignore[attr-defined]

    monkeypatch.setattr(trainer.MetricsLog, "write", lambda self, row: full() if row["step"] > 2 else None)
    with pytest.raises(RunFailure, match="step 4: no space left on the disk; free some"):
        train(_config(lab, run, _failing("raise", at=99)), observers=[Full()])


def test_what_a_data_source_returns_is_told_before_anything_is_written(lab: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"data source 'listing' of failing_lab: returned a list; .*lab\.py:"):
        train(_config(lab, run, _failing("raise"), "data.source={name: listing}"))
    assert not run.exists()


def test_memory_that_ends_before_the_first_step_is_the_users_to_mend(lab: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def preparing(*rest: object, **options: object) -> Any:
        return torch.empty(1 << 53)

    with pytest.raises(UserError, match=r"too little memory: 36,028\.8 TB more were asked for; "):
        train(_config(lab, run, _failing("raise")), preparing=preparing)
    assert not run.exists()
