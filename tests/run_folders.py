"""Run folders as `moelab train` leaves them, written by hand: for tests of what reads many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moelab.config.overlay import overlay
from moelab.config.run import RunConfig
from moelab.config.stored import to_yaml
from moelab.config.typed import SCHEMA

SMALL: dict[str, Any] = {
    "model": {
        "vocab_size": 257, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "moe": {"router": {"name": "softmax_topk", "norm_topk_prob": False}},
    },
    "train": {"steps": 30},
}  # fmt: skip


def row(step: int, tags: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": 512 * step,
        "flops": 10 * step,
        "flops_declared": 10.0,
        "seconds": 0.5 * step,
        **tags,
    }


def write_run(
    folder: Path, over: Mapping[str, Any] | None = None, rows: Sequence[Mapping[str, Any]] = (),
    summary: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """config.yaml and, as far as they are given, metrics.jsonl and summary.json."""
    folder.mkdir(parents=True)
    tree = overlay({**SMALL, "run_dir": str(folder)}, dict(over or {}), RunConfig)
    (folder / "config.yaml").write_text(to_yaml(SCHEMA.build(RunConfig, tree)))
    if rows:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps({"format_version": 3, "final": {}, **summary}))
    return folder


def finished_run(folder: Path, loss: float, over: Mapping[str, Any] | None = None, **summary: Any) -> Path:
    """A run that came to its end at step 30."""
    final = {"eval/loss": loss, "eval/bits_per_byte": loss / 2}
    rows = [row(0, {"eval/loss": 9.0}), row(30, {"train/loss": 1.0}), row(30, final)]
    return write_run(folder, over, rows, {"status": "finished", "steps": 30, "final": final, **summary})


def kill_holder(folder: Path) -> None:
    """Leave the lock of a process that is gone: it took it, and died without a word."""
    code = (
        "import os, sys; from pathlib import Path; from moelab.training.run_lock import hold\n"
        "with hold(Path(sys.argv[1])): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 9
    assert (folder / ".lock").exists()


def make_older(path: Path, seconds: float) -> None:
    before = path.stat().st_mtime - seconds
    os.utime(path, (before, before))
