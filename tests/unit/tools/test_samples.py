"""`moelab generate`: what checkpoints write to the same prompts, and how it reaches a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import moelab
from moelab.config.model import ModelConfig
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.hf.save import save_hf
from moelab_tools.cli import run
from moelab_tools.samples import Sample, show

MODEL = ModelConfig(
    vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two seeds and a copy of the first."""
    for name, seed in (("a", 0), ("b", 1), ("copy", 0)):
        save_hf(moelab.build(MODEL, seed=seed), tmp_path / name, dtype=torch.float32,
                extra_files=ByteTokenizer().files())  # fmt: skip
    return [str(tmp_path / name) for name in ("a", "b", "copy")]


def test_several_checkpoints_continue_the_same_prompts_with_the_same_numbers(folders: list[str], capsys):
    arguments = ["generate", *folders, "--prompt", "x", "--prompt", "y", "--tokens", "12", "--json"]
    assert run(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert [(one["checkpoint"], one["prompt"]) for one in first] == [(f, p) for p in "xy" for f in folders]
    texts = {(one["checkpoint"], one["prompt"]): one["text"] for one in first}
    assert texts[folders[0], "x"] == texts[folders[2], "x"]
    assert texts[folders[0], "x"] != texts[folders[1], "x"]
    assert run(["generate", folders[1], "--prompt", "x", "--tokens", "12", "--json", "--batch-size", "1"]) == 0
    (alone,) = json.loads(capsys.readouterr().out)
    assert alone["text"] == texts[folders[1], "x"], "what stands beside it changes nothing"


def test_they_stand_side_by_side_or_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    samples = [Sample(name, "p", f"text of {name}", "") for name in ("first", "second")]
    show(samples, 100)
    wide = capsys.readouterr().out.splitlines()
    assert any("first" in line and "second" in line for line in wide)
    assert any("text of first" in line and "text of second" in line for line in wide)
    show(samples, 40)
    narrow = capsys.readouterr().out.splitlines()
    assert narrow.index("-- first") < narrow.index("text of first") < narrow.index("-- second")


@pytest.mark.parametrize("count", [1, 2])
def test_a_model_can_write_nothing_that_acts_on_the_terminal(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    show([Sample("run[bold]", "p", "a\x1b[2J\u202eb\r\n[red]c", "")] * count, 100)
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\u202e\r")
    assert "\\x1b[2J\\u202eb\\r" in out
    assert out.count("[red]c") == count
