"""`moelab train` on the device: it learns, goes on after a stop, and what it saved is a CPU's to go on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import moelab
from on_device import DEVICE, rehearsed

pytestmark = pytest.mark.gpu

VARIANTS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "fp32": ("train.dtype=float32",),
    "micro_batches": ("train.micro_batch_size=2",),
    "recomputed": ("train.activation_checkpointing=1",),
    "kept_in_bf16": ("train.parameters_dtype=bfloat16",),
    "documents": ("data.packing=best_fit", "data.document_mask=true"),
    "bias_balanced": ("model.moe.router.balance=bias", "model.moe.balance_losses=[]"),
    "megablocks": (
        "model.moe.backend.name=megablocks",
        "model.hidden_size=128",
        "model.moe.layout.moe_intermediate_size=128",
    ),
}


def keys(folder: Path, steps: int, *more: str) -> list[str]:
    return [
        "train/tiny_moe", f"run_dir={folder}", f"train.steps={steps}", "train.batch_size=4", "train.log_every=2",
        "train.sequence_length=64", "evaluation.sequences=4", "evaluation.sample_tokens=4", "train.dtype=bfloat16",
        "schedule.name=constant", *more,
    ]  # fmt: skip


def settings(folder: Path, steps: int, *more: str) -> moelab.RunConfig:
    return moelab.load_config(*keys(folder, steps, *more))


def losses(folder: Path) -> dict[int, float]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.parametrize("name", rehearsed(list(VARIANTS)))
def test_a_run_learns_and_goes_on_after_a_stop(name: str, tmp_path: Path) -> None:
    if name == "megablocks" and DEVICE.type != "cuda":
        pytest.skip("MegaBlocks needs a CUDA device")
    more = VARIANTS[name]
    moelab.train(settings(tmp_path / "whole", 12, *more))
    moelab.train(settings(tmp_path / "halves", 6, *more))
    moelab.train(settings(tmp_path / "halves", 12, *more), resume=True)
    whole, halves = losses(tmp_path / "whole"), losses(tmp_path / "halves")
    assert whole.keys() == halves.keys()
    assert whole[12] < whole[2] - 0.1
    for step, loss in whole.items():  # attention's backward pass adds in any order on a GPU
        assert abs(halves[step] - loss) < 2e-2, f"step {step}"


def test_what_the_device_saved_a_cpu_goes_on_with(tmp_path: Path) -> None:
    moelab.train(settings(tmp_path / "run", 6))
    command = [sys.executable, "-m", "moelab", "train", *keys(tmp_path / "run", 12), "--resume"]
    subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=True, timeout=120)
    found = losses(tmp_path / "run")
    assert found[12] < found[2] - 0.1
