"""lm-evaluation-harness on a run: its numbers through the adapter, without a network."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moelab_tools.cli import run

if not os.environ.get("MOELAB_REQUIRE_EXTRAS"):
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval: make test-extras")
TINY = [
    "train/tiny_moe", "train.steps=1", "evaluation.sequences=2", "evaluation.sample_tokens=0", "data.tokenizer=bytes",
    "data.source.max_bytes_per_domain=200000", "model.num_hidden_layers=1",
]  # fmt: skip


@pytest.mark.slow
def test_lm_eval_and_moelab_find_the_same_bits_per_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model that knows nothing yet, so that what context each of them gives it hardly matters."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "run"
    assert run(["train", *TINY, f"run_dir={folder}"]) == 0
    assert run(["evaluate", str(folder), "--tasks", "heldout_continuation,heldout_perplexity", "--limit", "8"]) == 0
    scores = {(s["task"], s["metric"]): s for s in json.loads((folder / "lm_eval.json").read_text())}
    assert 0 <= scores["heldout_continuation", "acc"]["value"] <= 1
    assert scores["heldout_continuation", "acc"]["error"] is not None
    capsys.readouterr()
    assert run(["evaluate", str(folder), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)["eval/bits_per_byte"]
    assert scores["heldout_perplexity", "bits_per_byte"]["value"] == pytest.approx(ours, rel=0.02)
    assert run(["evaluate", str(folder), "--tasks", "no_such_task"]) == 2
    assert "heldout_continuation" in capsys.readouterr().err
