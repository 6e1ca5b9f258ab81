"""`moelab train` as a user runs it: a run folder, killed and resumed bit by bit, and wrong input refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moelab.training.format import FORMAT_VERSION, without_clock
from moelab_tools import cli

CONFIG = "configs/train/tiny_moe.yaml"
SMALL = [
    "train.steps=12", "train.batch_size=4", "train.sequence_length=32", "train.save_every=3", "train.log_every=2",
    "train.threads=1", "evaluation.sequences=4", "evaluation.every=6", "evaluation.sample_tokens=4",
    "data.source.domains=[code_py]", "data.source.max_bytes_per_domain=60000",
    "model.moe.router.name=sigmoid_topk",  # its bias is plugin state that must resume too
]  # fmt: skip
MOELAB = [sys.executable, "-m", "moelab"]


def _run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MOELAB, *arguments], cwd=root, capture_output=True, text=True, timeout=300, check=False)


# The command with an observer in place of the progress bar, which sends the process a signal from within: a watcher
# outside may look when it is too late.
STOPPED = """
import os, signal, sys
import moelab
from moelab_tools import cli, progress

class Stopper:
    def __init__(self, steps):
        pass

    @moelab.hookimpl
    def {hook}(self, step):
        if step == {step}:
            os.kill(os.getpid(), signal.{sent})

progress.TrainingProgress = Stopper
sys.exit(cli.run(sys.argv[1:]))
"""


def _stopped(root: Path, hook: str, step: int, sent: str, *arguments: str) -> int:
    """The exit code of a command that gets the signal `sent` in `hook` of `step`."""
    code = STOPPED.format(hook=hook, step=step, sent=sent)
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=root, capture_output=True, check=False)
    return done.returncode


def _metrics(run: Path) -> list[dict[str, float]]:
    return [without_clock(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _summary(run: Path) -> dict[str, Any]:
    """But for what says where and how fast it ran."""
    return dict(without_clock(json.loads((run / "summary.json").read_text())))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(__file__).resolve().parent.parent.parent
    run = tmp_path_factory.mktemp("runs") / "whole"
    outcome = _run(root, "train", CONFIG, *SMALL, f"run_dir={run}")
    assert outcome.returncode == 0, outcome.stderr
    assert str(run) in outcome.stdout.replace("\n", "")
    return run


def test_a_run_folder_holds_all_that_was_promised(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "log.txt", "evaluation_documents.jsonl"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step_00000009", "step_00000012"]
    saved = [line for line in (finished / "log.txt").read_text().splitlines() if "checkpoint: " in line]
    assert len(saved) == 4, "each step once: to write one again it would first be removed"
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == 12
    assert summary["tokens"] == 12 * 4 * 32
    assert summary["components"]["router"] == "sigmoid_topk"
    assert summary["flops"] == summary["flops_declared"] == summary["tokens"] * summary["flops_per_token"]  # K a token
    assert {"eval/loss", "eval/bits_per_byte", "train/loss", "moe/mean/max_violation"} <= summary["final"].keys()


def test_a_killed_run_resumes_to_the_same_bits(root: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    arguments = ("train", CONFIG, *SMALL, f"run_dir={run}")
    assert _stopped(root, "on_save", 6, "SIGKILL", *arguments) == -signal.SIGKILL
    assert not (run / "checkpoints" / "step_00000012").exists()
    refused = _run(root, *arguments)
    assert refused.returncode == 2, "a run folder is never overwritten unasked"
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    resumed = _run(root, *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("model.safetensors", "training.safetensors"):
        last = Path("checkpoints/step_00000012") / name
        assert (run / last).read_bytes() == (finished / last).read_bytes(), name
    assert _metrics(run) == _metrics(finished)
    assert _summary(run) == _summary(finished)


def test_a_run_killed_before_its_summary_gets_the_one_it_would_have_had(
    root: Path, finished: Path, tmp_path: Path
) -> None:
    """No step is left to do, so nothing is logged again: values, loads and backends come from what was written."""
    run = tmp_path / "late"
    shutil.copytree(finished, run)
    for name in ("summary.json", "evaluation_documents.jsonl"):
        (run / name).unlink()
    assert _run(root, "train", CONFIG, *SMALL, f"run_dir={run}", "--resume").returncode == 0
    assert _summary(run) == _summary(finished)
    assert len(_summary(run)["expert_load"]) == 2
    assert _metrics(run) == _metrics(finished)
    documents = "evaluation_documents.jsonl"
    assert (run / documents).read_bytes() == (finished / documents).read_bytes()


def test_flops_are_those_that_the_experts_served_and_go_on_after_a_resume(root: Path, tmp_path: Path) -> None:
    """ReLU routing serves another number of experts at each step: the FLOPs are the sum, not a rate times steps."""
    run = tmp_path / "remoe"
    small = [argument for argument in SMALL if "router" not in argument]
    arguments = ("train", CONFIG, *small, "train.micro_batch_size=2", "model.moe.router.name=remoe", f"run_dir={run}")
    losses = "model.moe.balance_losses=[{name: remoe_l1}]"
    assert _run(root, *arguments, losses).returncode == 0
    rows, summary = _metrics(run), json.loads((run / "summary.json").read_text())
    served = [row["compute/served_flops_per_token"] for row in rows if "train/loss" in row]
    assert len(set(served)) > 1
    assert summary["flops"] == round(sum(2 * 4 * 32 * flops for flops in served))  # logged every 2nd of 12 steps
    assert summary["flops"] != summary["flops_declared"] == summary["tokens"] * summary["flops_per_token"]
    assert summary["flops_per_token_served"] == summary["flops"] / summary["tokens"]
    assert summary["parameters"]["active_served"] > summary["parameters"]["active"]  # about E / 2 of them at the start
    assert summary["format_version"] == FORMAT_VERSION
    last = [row for row in rows if "eval/loss" in row][-1]
    assert (last["flops"], last["flops_declared"]) == (summary["flops"], summary["flops_declared"])
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    (run / "summary.json").unlink()
    assert _run(root, *arguments, losses, "--resume").returncode == 0
    assert _metrics(run) == rows
    assert json.loads((run / "summary.json").read_text())["flops"] == summary["flops"]


def test_a_checkpoint_that_did_not_count_is_refused(root: Path, finished: Path, tmp_path: Path) -> None:
    """Written by an earlier version: going on would add served FLOPs to those of the layout."""
    run = tmp_path / "old"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    path = run / "checkpoints" / "step_00000009" / "state.json"
    state = json.loads(path.read_text())
    del state["served_weights"], state["logged"], state["manifest"]
    path.write_text(json.dumps(state))
    (path.parent / "manifest.json").unlink()
    outcome = _run(root, "train", CONFIG, *SMALL, f"run_dir={run}", "--resume")
    assert outcome.returncode == 2
    assert "count what the experts served" in outcome.stderr


def test_an_interrupted_run_saves_at_its_step_and_resumes_to_the_same_bits(
    root: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "interrupted"
    arguments = ("train", CONFIG, *SMALL, f"run_dir={run}", "train.save_every=0")
    assert _stopped(root, "on_log", 2, "SIGTERM", *arguments) == 130
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert (run / "checkpoints" / f"step_{summary['steps']:08d}").is_dir()
    assert _run(root, *arguments, "--resume").returncode == 0
    last = Path("checkpoints/step_00000012/model.safetensors")
    assert (run / last).read_bytes() == (finished / last).read_bytes()


def test_the_same_command_gives_the_same_bits(root: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "again"
    assert _run(root, "train", CONFIG, *SMALL, f"run_dir={run}").returncode == 0
    last = Path("checkpoints/step_00000012/model.safetensors")
    assert (run / last).read_bytes() == (finished / last).read_bytes()


def test_a_finished_run_resumed_has_nothing_left_to_do(root: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    before = (run / "checkpoints/step_00000012/model.safetensors").read_bytes()
    outcome = _run(root, "train", CONFIG, *SMALL, f"run_dir={run}", "--resume")
    assert outcome.returncode == 0, outcome.stderr
    assert (run / "checkpoints/step_00000012/model.safetensors").read_bytes() == before
    assert _metrics(run) == _metrics(finished)


def test_resuming_under_another_config_is_refused(root: Path, finished: Path) -> None:
    outcome = _run(root, "train", CONFIG, *SMALL, f"run_dir={finished}", "--resume", "optimizer.lr=0.5")
    assert outcome.returncode == 2
    assert "optimizer.lr" in outcome.stderr


def test_a_damaged_checkpoint_is_named(root: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(finished, run)
    weights = run / "checkpoints/step_00000012/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    outcome = _run(root, "generate", str(run))
    assert outcome.returncode == 2
    assert "step_00000012/model.safetensors" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_the_stored_config_reproduces_the_run(root: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "reproduced"
    outcome = _run(root, "train", str(finished / "config.yaml"), f"run_dir={run}")
    assert outcome.returncode == 0, outcome.stderr
    last = Path("checkpoints/step_00000012/model.safetensors")
    assert (run / last).read_bytes() == (finished / last).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.moe.router.name=sofmax_topk"], ["model.moe.router.name", "did you mean 'softmax_topk'"]),
        (["model.moe.router={name: softmax_topk, norm_topk: true}"], ["norm_topk", "did you mean 'norm_topk_prob'"]),
        (["model.moe.layout.num_experts_per_tok=9"], ["num_experts_per_tok", "exceeds num_experts 8"]),
        (["model.moe.layout.num_experts=many"], ["model.moe.layout.num_experts", "Integer"]),
        (["model.hidden_sise=8"], ["model.hidden_sise", "did you mean 'hidden_size'"]),
        (["model.vocab_size=100"], ["model.vocab_size", "257"]),
        (["plugins=[not_there]"], ["not_there", "no such module"]),
        (["data.source={name: text, paths: [/nowhere/x.txt]}"], ["/nowhere/x.txt"]),
        (["run_dir=/proc/nothing/here"], ["/proc/nothing/here", "can't be written"]),
        (["train.init_from=/nowhere"], ["/nowhere", "no such folder"]),
        (["train.device=cuda"], ["train.device", "CUDA"]),
        (["model.moe.router.name=forced_random"], ["balance_losses.0", "load_balance", "scores"]),
        (['model.moe.layers={"5": {router: {name: softmax_topk}}}'], ['layers."5"', "0 .. 1"]),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    """In this process; a killed run's second start counts the lines of one of its own."""
    if "train.device=cuda" in arguments and os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a CUDA device")
    run = tmp_path / "run"
    monkeypatch.chdir(root)
    code = cli.run(["train", CONFIG, f"run_dir={run}", *SMALL[:-1], *arguments])
    told = capsys.readouterr().err
    assert code == 2, told
    assert len(told.strip().splitlines()) == 1, told
    for word in words:
        assert word in told
    assert not run.exists(), "nothing half-written"


def test_force_does_not_delete_what_is_no_run_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    outcome = _run(root, "train", CONFIG, *SMALL, f"run_dir={tmp_path}", "--force")
    assert outcome.returncode == 2
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_nan_stops_the_run_and_leaves_the_last_checkpoint(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "nan"
    outcome = _run(root, "train", CONFIG, *SMALL, f"run_dir={run}", "optimizer.lr=1e30", "schedule.warmup_steps=6")
    assert outcome.returncode == 1, outcome.stdout + outcome.stderr
    assert "NaN or Inf at step" in outcome.stderr
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"
