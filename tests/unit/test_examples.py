"""The examples run, and do what they say."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import moelab
from moelab import session

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "minimal_loop.py"
SMALL = [
    "train/tiny_moe", "train.steps=5", "train.batch_size=4", "train.sequence_length=32", "train.log_every=1",
    "train.threads=1", "evaluation.sequences=4", "evaluation.sample_tokens=0", "observers=[]",
    "data.source.domains=[code_py]", "data.source.max_bytes_per_domain=60000",
]  # fmt: skip


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def minimal_loop() -> ModuleType:
    return imported(EXAMPLE)


@pytest.fixture(scope="module")
def real_model() -> ModuleType:
    return imported(EXAMPLE.parent / "upcycle_a_real_model" / "run.py")


@pytest.mark.parametrize(
    "variant",
    [
        ["schedule.warmup_steps=2"],  # a balance loss
        ["model.moe.router.name=sigmoid_topk", "model.moe.balance_losses=[]"],  # a bias that moves after each step
        ["model.moe.router={name: noisy_topk}", "train.dtype=bfloat16"],  # noise from the step's own stream
    ],
)
def test_the_minimal_loop_is_the_trainer_bit_for_bit(
    minimal_loop: ModuleType, variant: list[str], tmp_path: Path
) -> None:
    config = moelab.load_config(*SMALL, *variant, f"run_dir={tmp_path / 'run'}")
    run = session.train(config, progress=False)
    model, losses = minimal_loop.train(config)
    assert losses == [row["train/loss"] for row in run.metrics if "train/loss" in row]
    expected = run.model.state_dict()
    assert all(value.equal(expected[name]) for name, value in model.state_dict().items())


def test_the_minimal_loop_is_short_and_uses_public_names_alone() -> None:
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) <= 80
    tree = ast.parse(text)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"sys", "torch", "moelab"}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "moelab"
    }
    assert used <= set(moelab.__all__)


def test_the_minimal_loop_is_a_script(
    minimal_loop: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import runpy
    import sys

    monkeypatch.setattr(sys, "argv", ["minimal_loop.py", *SMALL, "train.steps=2", f"run_dir={tmp_path / 'run'}"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert capsys.readouterr().out.count(": loss ") == 2
    assert not (tmp_path / "run").exists()


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """Programs of Slurm's names: srun runs what it is given, and torchrun is one process that leaves a summary."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in {
        "scontrol": 'if [ "$1" = show ]; then echo node7; else echo "$@" >> "$LOG"; fi',
        "srun": 'exec "$@"',
        "python": 'if [ "$1" = -c ]; then exec "$REAL" "$@"; fi\necho "$@" >> "$LOG"; eval "$DOES"',
    }.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    return programs


@pytest.mark.parametrize(
    ("does", "code", "requeued"),
    [
        ('echo \'{"status": "finished"}\' > "$RUN/summary.json"', 0, False),
        ('echo \'{"status": "interrupted"}\' > "$RUN/summary.json"; exit 1', 0, True),
        ('echo \'{"status": "failed"}\' > "$RUN/summary.json"; exit 1', 1, False),
        ("exit 2", 2, False),  # a mistake in the config: the summary is that of the time before
    ],
    ids=["finished", "interrupted", "failed", "mistaken"],
)
def test_the_slurm_script_requeues_what_was_interrupted_and_nothing_else(
    slurm: Path, tmp_path: Path, does: str, code: int, requeued: bool
) -> None:
    log, run = tmp_path / "log", tmp_path / "run"
    run.mkdir()
    (run / "summary.json").write_text('{"status": "interrupted"}')
    os.utime(run / "summary.json", (1, 1))
    environment = os.environ | {
        "PATH": f"{slurm}:{os.environ['PATH']}", "REAL": sys.executable, "LOG": str(log), "DOES": does,
        "RUN": str(run), "PROCESSES": "2", "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2",
    }  # fmt: skip
    script = EXAMPLE.parent / "slurm" / "train.sbatch"
    done = subprocess.run(
        ["bash", script, "train/tiny_moe", "parallel.shard=4"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    lines = log.read_text().splitlines()
    assert lines[1:] == (["requeue 12"] if requeued else [])
    wanted = ["--nnodes 2", "--nproc-per-node 2", "--rdzv-endpoint node7:20012", "-m moelab train train/tiny_moe"]
    assert all(part in lines[0] for part in wanted), lines[0]
    assert lines[0].endswith(f"parallel.shard=4 run_dir={run} --resume")


def test_the_real_model_is_declared_with_the_variants_and_seeds_that_its_program_reads(
    real_model: ModuleType, tmp_path: Path
) -> None:
    from moelab_tools.experiments.declaration import read_declaration

    declared = read_declaration(real_model.declared(tmp_path)).config
    assert tuple(declared.variants) == real_model.TRAINED
    assert declared.baseline == real_model.BASELINE
    assert tuple(declared.seed_list) == real_model.SEEDS
    assert {name for name in real_model.TRAINED if name != "dense"} <= set(real_model.CONVERSIONS)


def test_the_real_model_s_budgets_are_read_between_evaluations_and_paired_by_seed(real_model: ModuleType) -> None:
    dense = [{0: (0.0, 3.0), 16: (100.0, 2.0 + 0.1 * seed), 32: (200.0, 1.0)} for seed in range(3)]
    # At 150 FLOPs the dense runs are half way between their evaluations.
    sparse = [{0: (0.0, 3.5), 16: (150.0, 2.5 + 0.1 * seed)} for seed in range(3)]
    lines = real_model.budgets({"dense": dense, "sparse": sparse})
    assert "+0.5000 [+0.5000, +0.5000]" in lines[1]
    half = 4.303 * 0.05 / 3**0.5  # of 1.0, 1.05 and 1.1
    assert lines[2].split()[:3] == ["sparse", "16", "8192"]
    assert lines[2].endswith(f"+1.0500 [{1.05 - half:+.4f}, {1.05 + half:+.4f}]")
    assert real_model.at(dense[0], 201.0) == 1.0
    assert real_model.at(dense[0], 250.0) != real_model.at(dense[0], 250.0)  # it never got there: no number


def test_the_real_model_s_steps_add_up_what_went_on(
    real_model: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import json

    steps = real_model.Steps(tmp_path)
    steps.moelab("twice", "--version")
    first = json.loads(steps.file.read_text())
    assert first["cpu"] > 0
    assert first["peak"] > 1e6
    steps.file.write_text("".join(json.dumps(first | {"wall": 60.0, "cpu": cpu}) + "\n" for cpu in (2.0, 3.0)))
    for name in real_model.TRAINED:
        for seed in real_model.SEEDS:
            run = tmp_path / f"runs/runs/{name}_seed{seed}"
            run.mkdir(parents=True)
            (run / "summary.json").write_text('{"seconds": 90.0, "final": {"perf/memory_gb": 2.5}}')
    steps.table(tmp_path)
    told = capfd.readouterr().out
    assert any(line.split()[:3] == ["twice", "2.0", "5"] for line in told.splitlines()), told
    assert "of it a run of qwen2" in told


def test_the_real_model_is_judged_where_lm_eval_is_installed_and_says_so_where_not(
    real_model: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    steps = real_model.Steps(tmp_path)
    monkeypatch.setattr(steps, "moelab", lambda name, *arguments: asked.append(str(arguments[1])))
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: None)
    real_model.judge(steps, tmp_path)
    assert not asked
    assert "lm-eval's tasks are left out" in capfd.readouterr().out
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: object())
    real_model.judge(steps, tmp_path)
    assert [Path(path).name for path in asked] == ["dense", "dense_seed0", "qwen2_seed0", "virtual_group_seed0"]
