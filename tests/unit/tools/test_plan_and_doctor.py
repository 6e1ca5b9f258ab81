"""`moelab plan` and `moelab doctor` as a user sees them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moelab.training import peak
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
        (["--bandwidth", "10", "0", "--tflops", "1"], "--bandwidth: must be a number above 0, not 0"),
        (["--tflops", "0", "--machine", "h100"], "--tflops: must be a number above 0, not 0"),
        (["--tflops", "nan", "--machine", "h100"], "--tflops: must be a number above 0, not nan"),
        (["--device-memory", "-3"], "--device-memory: must be a number above 0, not -3"),
        (["--latency", "1", "inf", "--machine", "h100"], "--latency: must be a number of 0 or more, not inf"),
    ):
        assert run(["plan", config, *given]) == 2
        assert words in capsys.readouterr().err


def test_doctor_tries_every_backend_and_says_why_one_can_not_serve(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    rates = {torch.float32: 3e9, torch.bfloat16: 7e9}
    monkeypatch.setattr(peak, "peak_flops", lambda precision: rates[precision.dtype])
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for dtype, rate in (("float32", 3), ("bfloat16", 7)):  # what a run's MFU is a share of
        assert f"{rate} GFLOP/s" in next(line for line in lines if line.split()[:1] == [dtype])
    for name in ("auto", "batched", "grouped_mm", "loop"):
        found = [line for line in lines if line.split()[:2] == [name, "cpu"]]
        assert len(found) == 2
        assert all("works (error" in line for line in found)
    refused = next(line for line in lines if line.split()[:2] == ["megablocks", "cpu"])
    assert "no: " in refused
    assert not any("BROKEN" in line for line in lines)
    assert not any("no: " in line for line in lines if line.split()[:1] == ["densemixer"])


def broken_installation(site: Path, body: str) -> None:
    """Two packages with `body` in them: a plugin of an installed package, and one that moelab uses."""
    for name in ("broken_lab", "transformers"):
        (site / f"{name}.py").write_text(f"# moelab_routers\n{body}\n")
    told = site / "broken_lab-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-lab\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text("[moelab]\nours = broken_lab\n")


@pytest.mark.parametrize("body", ["raise RuntimeError('no build of this machine')", "import sys; sys.exit(0)"])
def test_doctor_says_what_is_broken_and_goes_on(body: str, tmp_path: Path) -> None:
    broken_installation(tmp_path, body)
    done = in_its_own_process(tmp_path, "doctor")
    assert done.returncode == 1, done.stderr
    raised = "RuntimeError" if "Runtime" in body else "SystemExit"
    told = [line for line in done.stdout.splitlines() if "BROKEN" in line]
    assert [line.split()[0] for line in told] == ["transformers", "plugins"]
    assert all(raised in line for line in told)
    assert "'broken-lab:ours' (broken_lab)" in told[1]
    assert len([line for line in done.stdout.splitlines() if "works (error" in line]) >= 8
    assert done.stderr == "failed: broken here: transformers, broken-lab:ours\n"


@pytest.mark.parametrize("body", ["raise RuntimeError('no build of this machine')", "import sys; sys.exit(0)"])
def test_a_broken_package_that_a_command_needs_is_one_line_in_any_of_them(body: str, tmp_path: Path) -> None:
    (tmp_path / "pandas.py").write_text(f"{body}\n")
    program = "from moelab_tools import cli; cli.moelab.main = lambda *a, **o: __import__('pandas'); cli.main()"
    done = in_its_own_process(tmp_path, "runs", program=program)
    assert (done.returncode, done.stdout) == (2, "")
    raised = "RuntimeError: no build of this machine" if "Runtime" in body else "SystemExit: 0"
    assert done.stderr == (
        f"error: the package pandas is installed and can't be imported: {raised} (pandas.py:1); mend or uninstall "
        "it, or do without what needs it\n"
    )


def in_its_own_process(site: Path, *arguments: str, program: str = "") -> subprocess.CompletedProcess[str]:
    """`moelab ARGUMENTS` where `site` holds what is installed beside the rest."""
    python_path = os.pathsep.join([str(site), *filter(None, sys.path)])
    command = [sys.executable, "-c", program] if program else [sys.executable, "-m", "moelab"]
    return subprocess.run(
        [*command, *arguments],
        env=os.environ | {"PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        check=False,
    )
