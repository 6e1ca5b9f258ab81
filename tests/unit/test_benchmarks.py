"""The benchmarks run, in small, and are honest about what is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def _run(root: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_benchmark_says_that_nothing_was_measured(root: Path, tmp_path: Path) -> None:
    done = _run(root, "gpu.py", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "no CUDA device; nothing was measured and nothing written" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_cpu_step_agrees_with_transformers_and_writes_its_table(root: Path, tmp_path: Path) -> None:
    small = "--shape 4:2:16 --hidden 32 --layers 1 --shared 32 --vocab 64 --batch 2 --sequence 16 --rounds 2"
    done = _run(
        root,
        "cpu_step.py",
        *small.split(),
        "--dtype",
        "float32",
        "--out",
        str(tmp_path),
        "--sides",
        "transformers grouped_mm",
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "cpu_step.json").read_text())["results"]
    losses = [side["first_loss"] for side in result["sides"].values()]
    assert len(losses) == 2
    assert max(losses) - min(losses) < 1e-5
    assert "(as shipped), median of 2 rounds" in (tmp_path / "cpu_step.md").read_text()
