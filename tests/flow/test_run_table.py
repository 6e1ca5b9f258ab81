"""What `moelab config` promises and `moelab runs` reports, held against real runs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import moelab
from moelab.config.text import read_tree
from moelab_tools.cli import run

SHORT = [
    "train.steps=2", "train.batch_size=2", "train.sequence_length=32", "evaluation.sequences=2", "observers=[]",
    "evaluation.sample_tokens=0", "data.source.domains=[code_py]", "data.source.max_bytes_per_domain=50000",
]  # fmt: skip


def test_resolved_is_what_a_run_stores_and_the_table_what_it_reached(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(root / "configs/train/tiny_moe.yaml"), *SHORT, f"run_dir={tmp_path / 'run'}", "name=first"]
    assert run(["config", *arguments, "--resolved"]) == 0
    promised = read_tree(capsys.readouterr().out, "resolved")
    assert run(["train", *arguments]) == 0
    assert promised == read_tree((tmp_path / "run" / "config.yaml").read_text(), "stored")
    (record,) = moelab.run_records(tmp_path)
    assert (record.name, record.state, record.step, record.steps, record.evaluated_at) == ("first", "finished", 2, 2, 2)
    assert record.loss is not None
    assert record.bits_per_byte is not None
    assert 0 < record.bits_per_byte < record.loss * 2
    assert record.problem is None


def test_a_run_is_running_until_it_is_killed(root: Path, tmp_path: Path) -> None:
    """Long enough that it can't end by itself while somebody looks."""
    changes = [*SHORT[1:], "train.steps=1000000", "train.log_every=1", f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "moelab", "train", str(root / "configs/train/tiny_moe.yaml"), *changes]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (seen := moelab.run_records(tmp_path)) or not seen[0].step:
            assert process.poll() is None, "the run ended by itself"
            time.sleep(0.05)
        assert seen[0].state == "running"
    finally:
        process.kill()
        process.wait()
    (record,) = moelab.run_records(tmp_path)
    assert record.state == "killed"
    assert record.step is not None
    assert record.step >= (seen[0].step or 0)
