"""`moelab plan` and `moelab doctor` as a user sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelab_tools.cli import run


def test_plan_prints_the_peak_and_whether_it_fits(root: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["plan", str(root / "configs/train/tiny_moe.yaml"), "--devices", "4", "--device-memory", "1"]
    assert run(arguments) == 0
    out = capsys.readouterr().out
    assert "288,512 parameters; 4 x cuda, 8 x 128 tokens each, float32 matmuls" in out
    assert "all-gather of parameters" in out
    assert out.endswith("fits in 1 GB\n")


def test_plan_takes_a_model_file_and_overrides(root: Path, capsys: pytest.CaptureFixture[str]):
    config = str(root / "configs/model/qwen2-0.5b.yaml")
    assert run(["plan", config, "train.batch_size=1", "train.dtype=bfloat16", "--device-memory", "0.1"]) == 0
    assert "does not fit in 0.1 GB" in capsys.readouterr().out


def test_plan_refuses_groups_that_do_not_divide(root: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["plan", str(root / "configs/train/tiny_moe.yaml"), "--devices", "4", "--expert-parallel", "3"]
    assert run(arguments) == 2
    assert "does not divide" in capsys.readouterr().err


def test_doctor_tries_every_backend_and_says_why_one_can_not_serve(capsys: pytest.CaptureFixture[str]):
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("auto", "batched", "grouped_mm", "loop"):
        found = [line for line in lines if line.split()[:2] == [name, "cpu"]]
        assert len(found) == 2
        assert all("works (error" in line for line in found)
    refused = next(line for line in lines if line.split()[:2] == ["megablocks", "cpu"])
    assert "no: " in refused
    assert not any("BROKEN" in line for line in lines)
