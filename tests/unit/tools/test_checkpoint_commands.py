"""`evaluate`, `explain` and `plan` on a folder take its model and tokenizer, and refuse a config that means another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moelab
from moelab.config.model import ModelConfig
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.hf.save import save_hf
from moelab_tools.cli import run

MODEL = ModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-3, rope_theta=1e5,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_hf(moelab.build(MODEL, seed=3), tmp_path / "hf", dtype=torch.float32, extra_files=ByteTokenizer().files())
    return tmp_path / "hf"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"text {n} of {n**3} " * 8}) + "\n" for n in range(20))
    )
    tree = {
        "data": {"source": {"name": "jsonl", "paths": [str(tmp_path / "a.jsonl")]}, "validation_fraction": 0.2},
        "train": {"steps": 1, "batch_size": 2, "sequence_length": 16}, "observers": [],
        "evaluation": {"sequences": 4, "sample_tokens": 0},
    }  # fmt: skip
    (tmp_path / "data.yaml").write_text(json.dumps(tree))
    return tmp_path / "data.yaml"


def test_evaluate_takes_model_and_tokenizer_from_the_folder(folder: Path, data: Path, capsys):
    assert run(["evaluate", str(folder), str(data), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "eval/loss" in json.loads(out)
    assert f"model: as in the checkpoint {folder}" in err
    assert "tokenizer: bytes" in err


def test_evaluate_gives_intervals_by_domain_and_by_place(folder: Path, data: Path, capsys):
    assert run(["evaluate", str(folder), str(data), "evaluation.sequences=99", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["unit"] == "bits per byte"
    assert found["all"]["value"] == pytest.approx(found["eval/bits_per_byte"])
    assert found["all"]["low"] < found["all"]["value"] < found["all"]["high"]
    assert list(found["by_domain"]) == ["a"]
    assert list(found["by_position"]) == ["01", "02-03", "04-07", "08-15", "16"]
    assert sum(one["tokens"] for one in found["by_context"].values()) == found["all"]["tokens"]
    assert run(["evaluate", str(folder), str(data), "evaluation.batch_size=1", "evaluation.sequences=99"]) == 0
    printed = capsys.readouterr().out
    assert "by tokens before the target in its sequence:" in printed
    assert f"{found['all']['value']:.4f}" in printed


@pytest.mark.parametrize("override", ["model.rope_theta=1e6", "model.rms_norm_eps=1e-6", "model.num_attention_heads=8"])
def test_evaluate_refuses_another_model_unless_it_is_named(folder: Path, data: Path, override: str, capsys):
    assert run(["evaluate", str(folder), str(data), override]) == 2
    key = override.partition("=")[0]
    assert f"{key}: is not as in the checkpoint" in capsys.readouterr().err
    if "heads" not in key:
        assert run(["evaluate", str(folder), str(data), override, f"train.init_overrides=[{key}]"]) == 0


def test_a_run_is_evaluated_under_its_own_config_when_its_tokenizer_file_is_gone(folder: Path, data: Path, capsys):
    """The checkpoint holds the tokenizer; the path it once came from means nothing elsewhere."""
    tokenizer = json.loads(ByteTokenizer().files()["tokenizer.json"])
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 257, "content": "<|im_end|>"})
    place = data.parent / "tokenizer.json"
    place.write_text(json.dumps(tokenizer))
    command = ["train", str(data), f"run_dir={data.parent / 'run'}", f"data.tokenizer={place}"]
    said = [f"model.{key}={getattr(MODEL, key)}" for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
    )]  # fmt: skip
    assert run([*command, *said]) == 0
    place.unlink()
    capsys.readouterr()
    assert run(["evaluate", str(data.parent / "run"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    summary = json.loads((data.parent / "run" / "summary.json").read_text())
    assert values["eval/loss"] == pytest.approx(summary["final"]["eval/loss"], rel=1e-6)
    assert run(["evaluate", str(data.parent / "run"), "data.tokenizer=bytes"]) == 2


def test_explain_and_plan_take_a_folder(folder: Path, capsys):
    assert run(["explain", str(folder), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["parameters"] == sum(p.numel() for p in moelab.build(MODEL).parameters())
    assert run(["explain", str(folder), "model.num_hidden_layers=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] < plain["parameters"]
    assert run(["plan", str(folder), "train.sequence_length=16"]) == 0
    assert f"{plain['parameters']:,} parameters" in capsys.readouterr().out
    assert run(["explain", str(folder), str(folder)]) == 2


def test_a_named_override_is_told_on_the_terminal_and_in_the_log(folder: Path, data: Path):
    """In a process of its own: a test's own logging would show what a terminal doesn't."""
    done = subprocess.run(
        [sys.executable, "-m", "moelab", "train", str(data), f"run_dir={data.parent / 'run'}",
         f"train.init_from={folder}", "model.rope_theta=1e6", "train.init_overrides=[model.rope_theta]"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = f"train.init_overrides: model.rope_theta is 1000000.0, where {folder} has 100000.0"
    assert line in done.stderr
    assert line in (data.parent / "run" / "log.txt").read_text()
