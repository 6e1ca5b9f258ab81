"""A sweep from plan to report: what is skipped, resumed, refused, and what becomes of a run that fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moelab.errors import RunFailure, UserError
from moelab_tools import cli
from moelab_tools.sweep.run import SweepRequest, run_sweep
from sweeping import TINY, InProcess, quiet

AXES = ["model.moe.router.name=softmax_topk,sigmoid_topk", "seed=0..1"]
NAMES = [f"router-{router}_topk_seed{seed}" for router in ("softmax", "sigmoid") for seed in (0, 1)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two variants and two seeds that ended."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    worker = InProcess()
    comparison = run_sweep(SweepRequest([*TINY, *AXES], out), quiet(), worker)
    assert worker.started == NAMES
    assert comparison is not None
    assert {line.name: len(line.runs) for line in comparison.lines} == {
        "router-softmax_topk": 2,
        "router-sigmoid_topk": 2,
    }
    return out


def test_a_finished_sweep_is_not_run_again_and_more_seeds_are_added(done: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    moved = [argument.replace(str(done), str(out)) for argument in TINY]
    worker = InProcess()
    run_sweep(SweepRequest([*moved, *AXES], out), quiet(), worker)
    assert worker.started == [], "run_dir is bookkeeping: a folder that was moved holds the same runs"
    run_sweep(SweepRequest([*moved, AXES[0], "seed=0..2"], out), quiet(), worker)
    assert worker.started == ["router-softmax_topk_seed2", "router-sigmoid_topk_seed2"]


def test_a_sweep_tells_how_it_was_made_and_its_runs_can_be_run_alone(done: Path, tmp_path: Path) -> None:
    record = json.loads((done / "sweep.json").read_text())
    assert record["arguments"][-2:] == AXES
    assert list(record["runs"]) == NAMES
    config = done / "configs" / f"{NAMES[0]}.yaml"
    assert cli.run(["train", str(config), f"run_dir={tmp_path / 'alone'}"]) == 0
    rows = [
        (folder / "evaluation_documents.jsonl").read_text() for folder in (done / "runs" / NAMES[0], tmp_path / "alone")
    ]
    assert rows[0] == rows[1]


def test_a_run_that_was_killed_goes_on_and_one_between_runs_begins(done: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    (out / "runs" / NAMES[1] / "summary.json").unlink()  # killed behind its last checkpoint
    shutil.rmtree(out / "runs" / NAMES[3])
    worker = InProcess()
    run_sweep(SweepRequest([*TINY, *AXES], out), quiet(), worker)
    assert worker.started == [NAMES[1], NAMES[3]]
    assert (
        "resumed at step 2" in (out / "logs" / f"{NAMES[1]}.log").read_text()
        or "warning" in (out / "logs" / f"{NAMES[1]}.log").read_text()
    )


def test_a_changed_config_is_refused_by_key_and_trained_again_by_force(done: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    before = {name: (out / "runs" / name / "config.yaml").stat().st_mtime_ns for name in NAMES}
    changed = SweepRequest([*TINY, *AXES, "optimizer.lr=1e-4"], out)
    with pytest.raises(UserError, match=r"4 runs.*optimizer\.lr: 0\.003 there, 0\.0001 here.*--force"):
        run_sweep(changed, quiet(), InProcess())
    assert {name: (out / "runs" / name / "config.yaml").stat().st_mtime_ns for name in NAMES} == before
    worker = InProcess()
    run_sweep(SweepRequest([*TINY, AXES[0], "seed=0", "optimizer.lr=1e-4"], out, force=True), quiet(), worker)
    assert worker.started == [NAMES[0], NAMES[2]]
    assert "lr: 0.003" in (out / "runs" / NAMES[1] / "config.yaml").read_text(), "what is not asked for is left alone"


def test_bookkeeping_is_no_change(done: Path, tmp_path: Path) -> None:
    out, worker = tmp_path / "out", InProcess()
    shutil.copytree(done, out)
    run_sweep(SweepRequest([*TINY, *AXES, "train.log_every=2"], out), quiet(), worker)
    assert worker.started == []


def test_a_failed_run_is_told_at_the_end_and_the_others_are_compared(tmp_path: Path) -> None:
    def fail(name: str) -> int | None:
        return 1 if name == NAMES[1] else None

    worker, console = InProcess(before=fail), quiet()
    with pytest.raises(RunFailure, match=rf"1 of 4 runs(.|\n)*{NAMES[1]}: failed") as raised:
        run_sweep(SweepRequest([*TINY, *AXES], tmp_path / "out"), console, worker)
    assert NAMES[0] not in str(raised.value)
    assert worker.started == NAMES
    shown = console.export_text()
    assert f"{NAMES[1]} is not in the comparison" in shown
    assert (tmp_path / "out" / "report" / "report.html").is_file()
    worker = InProcess()
    run_sweep(SweepRequest([*TINY, *AXES], tmp_path / "out"), quiet(), worker)
    assert worker.started == [NAMES[1]]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    console = quiet()
    assert run_sweep(SweepRequest([*TINY, *AXES], tmp_path / "out", dry_run=True), console) is None
    assert f"{NAMES[2]}: new" in console.export_text()
    assert not (tmp_path / "out").exists()


def test_two_sweeps_do_not_write_to_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def second(name: str) -> int | None:
        with pytest.raises(UserError, match=r"--out.*is being written by process"):
            run_sweep(SweepRequest([*TINY, "seed=0"], out), quiet(), InProcess())
        return 1

    with pytest.raises(RunFailure):
        run_sweep(SweepRequest([*TINY, "seed=0"], out), quiet(), InProcess(before=second))


def test_the_command_refuses_a_wrong_override_before_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.run(["sweep", *TINY, "train.stepz=1,2", "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert "train.stepz: no such key" in shown
    assert "did you mean 'steps'" in shown
    assert not out.exists()
