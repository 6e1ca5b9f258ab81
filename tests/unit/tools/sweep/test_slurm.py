"""Jobs through submitit, with its local executor: the same runs, interrupted and submitted again."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moelab.errors import ConfigError, UserError
from moelab_tools.cli import run
from moelab_tools.sweep.run import SweepRequest, run_sweep
from moelab_tools.sweep.slurm import MoelabJob, SubmititWorker, SubmittedJob, slurm_worker
from sweeping import TINY, InProcess, quiet

pytest.importorskip("submitit")


def test_what_is_pickled_is_the_command_and_nothing_else() -> None:
    job = MoelabJob(["train", "x.yaml"])
    job._process = object()  # type: ignore[assignment]
    assert vars(pickle.loads(pickle.dumps(job))) == {"arguments": ["train", "x.yaml"], "_process": None}


def test_a_job_that_must_go_lets_the_run_save_and_comes_back() -> None:
    code = "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print(1, flush=True); signal.pause()"
    job = MoelabJob(["train", "x.yaml", "--resume"])
    job._process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert job._process.stdout is not None
    job._process.stdout.readline()  # its handler is there
    again = job.checkpoint()
    assert job._process.poll() == 7, "it was told, and waited for"
    assert isinstance(again.function, MoelabJob)
    assert again.function.arguments == ["train", "x.yaml", "--resume"]


def test_a_preempted_job_saves_is_requeued_and_goes_on(tmp_path: Path) -> None:
    """The signal goes to submitit's task, as Slurm sends it; the local executor then starts the job again."""
    out = tmp_path / "out"
    worker = slurm_worker(out, ["timeout_min=5"], cluster="local")
    config = [*TINY, "train.steps=30000", "train.save_every=50", "train.log_every=50", f"run_dir={tmp_path / 'run'}"]
    job = worker.start("long", ["train", *config, "--resume"], out / "logs" / "long.log")
    assert isinstance(job, SubmittedJob)
    checkpoints = tmp_path / "run" / "checkpoints"
    while not list(checkpoints.glob("step_*")):
        assert job.poll() is None, (out / "logs" / "long.log").read_text()
        time.sleep(0.1)
    log = out / "logs" / "long.log"
    assert log.is_symlink()
    for waited in range(3000):  # tenths of a second
        if waited % 50 == 0 and "Caught signal" not in log.read_text():
            _preempt(job.job)  # again where /proc missed the child: its list is no snapshot, see proc(5)
        assert job.poll() is None, log.read_text()
        time.sleep(0.1)
        if "resumed at step" in log.read_text():
            break
    assert "resumed at step" in log.read_text()
    running = json.loads((tmp_path / "run" / ".lock").read_text())["pid"]
    job.job.cancel()
    job.job.wait()
    with contextlib.suppress(ProcessLookupError):  # Slurm ends all of a job; the local executor its own process alone
        os.kill(running, signal.SIGKILL)


def _preempt(job: Any) -> None:
    """What Slurm sends before it takes the node away, to the process that runs the pickled function."""
    children = Path(f"/proc/{job.job_id}/task/{job.job_id}/children")
    if not children.exists():
        pytest.skip("no /proc that names children")
    for child in children.read_text().split():
        os.kill(int(child), signal.SIGUSR2)


@dataclass
class _Here:
    """An executor whose jobs are over when they are submitted."""

    folder: Path
    commands: list[list[str]] = field(default_factory=list)

    def update_parameters(self, **parameters: Any) -> None:
        pass

    def submit(self, work: MoelabJob) -> Any:
        self.commands.append(work.arguments)
        code = InProcess().start("x", work.arguments, self.folder / "1_0_log.out").poll()
        paths = SimpleNamespace(stdout=self.folder / "1_0_log.out", result_pickle=self.folder)
        return SimpleNamespace(job_id="1", paths=paths, done=lambda: True, result=lambda: code)


class _Known:
    """An executor that knows one running job."""

    def __init__(self) -> None:
        self.submitted: list[MoelabJob] = []

    class job_class:
        def __init__(self, folder: Path, job_id: str) -> None:
            self.job_id = job_id
            self.paths = type("Paths", (), {"stdout": folder / f"{job_id}_0_log.out"})

        def done(self) -> bool:
            return self.job_id == "over"

    def update_parameters(self, **parameters: Any) -> None:
        pass

    def submit(self, work: MoelabJob) -> Any:
        self.submitted.append(work)
        return self.job_class(Path(self.folder), f"new{len(self.submitted)}")

    folder = ""


def test_a_sweep_of_jobs_ends_with_a_comparison(tmp_path: Path) -> None:
    """The jobs here are processes of this test; what is submitted, and read, is as on a cluster."""
    out = tmp_path / "out"
    executor = _Here(out / "slurm")
    run_sweep(SweepRequest([*TINY, "seed=0"], out), quiet(), SubmititWorker(out, executor))
    assert executor.commands == [["train", str(out / "configs" / "tiny_moe_seed0.yaml"), "--resume"]]
    assert (out / "report" / "report.html").is_file()
    assert json.loads((out / "slurm" / "jobs.json").read_text()) == {"tiny_moe_seed0": "1"}


def test_a_job_that_is_still_there_is_waited_for_and_not_submitted_twice(tmp_path: Path) -> None:
    executor = _Known()
    executor.folder = str(tmp_path / "slurm")
    worker = SubmititWorker(tmp_path, executor, {"a": "running", "b": "over"})
    (tmp_path / "slurm").mkdir()
    for name in ("a", "b"):
        worker.start(name, ["train", name], tmp_path / "logs" / f"{name}.log")
    assert [job.arguments for job in executor.submitted] == [["train", "b"]]
    assert worker.known == {"a": "running", "b": "new1"}


@pytest.mark.parametrize("command", [["sweep", "nowhere"], ["experiment", "shared_expert"]])
def test_an_option_for_slurm_without_slurm_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """It was passed over, and the runs were trained here."""
    monkeypatch.chdir(tmp_path)
    assert run([*command, "--slurm-option", "timeout_min=5", "--dry-run"]) == 2
    assert "--slurm-option timeout_min=5: goes with --slurm" in capsys.readouterr().err


def test_an_unknown_option_and_a_machine_without_slurm_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="no KEY=VALUE"):
        slurm_worker(tmp_path, ["timeout"], cluster="local")
    with pytest.raises(ConfigError, match="--slurm-option timeout_mins=3"):
        slurm_worker(tmp_path, ["timeout_mins=3"], cluster="local")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no srun"):
        slurm_worker(tmp_path)
