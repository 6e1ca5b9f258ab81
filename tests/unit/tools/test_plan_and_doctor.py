"""`moelab plan` and `moelab doctor` as a user sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelab_tools.cli import run


def test_plan_prints_the_peak_and_whether_it_fits(root: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["plan", str(root / "configs/train/tiny_moe.yaml"), "parallel.shard=4", "--device-memory", "1"]
    assert run(arguments) == 0
    out = capsys.readouterr().out
    assert "288,512 parameters; 4 x cuda, 2 x 128 tokens each, float32 matmuls" in out
    assert "all-gather of parameters" in out
    assert out.endswith("fits in 1 GB\n")


def test_plan_takes_a_model_file_and_overrides(root: Path, capsys: pytest.CaptureFixture[str]):
    config = str(root / "configs/model/qwen2-0.5b.yaml")
    assert run(["plan", config, "train.batch_size=1", "train.dtype=bfloat16", "--device-memory", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "does not fit in 0.1 GB" in out
    # 24 layers, keys and values of 2 heads of 64, 2 bytes each.
    assert "generation keeps 12,288 bytes of each token in bfloat16, 1.61 GB of 131,072 tokens" in out


def test_plan_refuses_a_mesh_that_does_not_divide(root: Path, capsys: pytest.CaptureFixture[str]):
    config = str(root / "configs/train/tiny_moe.yaml")
    assert run(["plan", config, "parallel.shard=4", "parallel.expert=3"]) == 2
    assert "does not divide" in capsys.readouterr().err
    assert run(["plan", config, "parallel.shard=2", "train.micro_batch_size=3"]) == 2
    assert "train.batch_size" in capsys.readouterr().err


def test_plan_gives_times_on_a_machine(root: Path, capsys: pytest.CaptureFixture[str]):
    """What is given takes the place of the machine's own: at half of the peak products take twice as long."""
    config = [str(root / "configs/train/tiny_moe.yaml"), "parallel.shard=4", "train.dtype=bfloat16"]
    seconds = []
    for rate in ("989.4", "494.7"):
        assert run(["plan", *config, "--machine", "h100", "--tflops", rate]) == 0
        out = capsys.readouterr().out
        seconds.append(float(out.split("matrix products")[1].split("ms")[0]))
        assert "everything overlaps" in out
        assert out.endswith("fits in 80 GB\n")
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=0.5)  # of two digits


def test_plan_refuses_half_a_machine(root: Path, capsys: pytest.CaptureFixture[str]):
    config = str(root / "configs/train/tiny_moe.yaml")
    for given, words in (
        (["--machine", "h10"], "no 'h10'"),
        (["--bandwidth", "10", "1"], "need both"),
        (["--tflops", "1"], "need both"),
        (["--node", "4"], "say nothing without"),
        (["--bandwidth", "10", "0", "--tflops", "1"], "must be positive"),
    ):
        assert run(["plan", config, *given]) == 2
        assert words in capsys.readouterr().err


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
