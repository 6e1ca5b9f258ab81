"""The examples run, and do what they say."""

from __future__ import annotations

import ast
import importlib.util
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


@pytest.fixture(scope="module")
def minimal_loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_loop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
