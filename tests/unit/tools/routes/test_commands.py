"""trace, agreement, replay, view and ablate as a user runs them, on a run of two steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.hf.save import save_hf
from moelab_tools.cli import run
from moelab_tools.routes import source

DATA = {
    "data": {"source": {"name": "jsonl", "deduplicate": False}, "validation_fraction": 0.4},
    "train": {"steps": 2, "batch_size": 4, "sequence_length": 32}, "observers": [],
    "evaluation": {"sequences": 12, "sample_tokens": 0, "batch_size": 4},
}  # fmt: skip


def _train(folder: Path, name: str, *changed: str) -> Path:
    path = folder / "texts.jsonl"
    if not path.exists():
        rows = [{"text": f"text {n} of {n**3}, " * 9 + "\u00e9\n", "domain": f"d{n % 3}"} for n in range(40)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree = DATA | {
            "data": DATA["data"]
            | {"source": {"name": "jsonl", "paths": [str(path)], "domain_key": "domain", "deduplicate": False}}
        }
        (folder / "data.yaml").write_text(json.dumps(tree))
    root = Path(__file__).resolve().parents[4]
    code = run(
        ["train", str(root / "configs/train/tiny_moe.yaml"), str(folder / "data.yaml"), f"run_dir={folder / name}",
         "model.hidden_size=32", "model.intermediate_size=48", "model.initializer_range=0.3", *changed]
    )  # fmt: skip
    assert code == 0
    return folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    _train(folder, "a")
    _train(folder, "b", "seed=1")
    _train(folder, "three", "model.num_hidden_layers=3")
    for name in ("a", "b", "three"):
        assert run(["trace", str(folder / name), "--out", str(folder / f"trace_{name}")]) == 0
    return folder


def _json(capsys: Any, *arguments: object) -> Any:
    capsys.readouterr()
    assert run([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _narrow(capsys: Any, *arguments: object) -> str:
    """What a command prints; nothing stands beyond column 80 but what a path makes long."""
    capsys.readouterr()
    assert run([*map(str, arguments)]) == 0
    text = str(capsys.readouterr().out)
    for line in text.splitlines():
        assert len(line) <= 80 or "/" in line, line
    return text


def test_a_trace_says_what_lies_in_it_and_where_it_is(runs: Path, capsys):
    out = runs / "again"
    text = _narrow(capsys, "trace", runs / "a", "--tokens", 100, "--out", out)
    assert "128 tokens (4 of" in text
    assert f"trace: {out}" in text
    arrays = load_file(out / "routes.safetensors")
    assert arrays["token_id"].shape == (4, 32)
    assert np.bincount(arrays["layer_01.expert"], minlength=8).sum() == 2 * 128


def test_files_of_text_are_traced_too(runs: Path, tmp_path: Path, capsys):
    (tmp_path / "one.txt").write_text("some words")
    (tmp_path / "two.txt").write_text("and more of them")
    data = ["--data", str(tmp_path / "one.txt"), "--data", str(tmp_path / "two.txt")]
    assert run(["trace", str(runs / "a"), *data, "--out", str(tmp_path / "t")]) == 0
    assert "windows of 27 tokens" in capsys.readouterr().err
    head = json.loads((tmp_path / "t" / "trace.json").read_text())
    assert [entry["name"] for entry in head["documents"]] == ["one.txt", "two.txt"]


def test_a_hugging_face_folder_needs_no_config_beside_files_of_text(tmp_path: Path, capsys):
    moe = MoEConfig(
        layout={"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        router={"name": "softmax_topk"}, shared_expert={"name": "gated", "intermediate_size": 32},
    )  # fmt: skip
    model = moelab.build(ModelConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, moe=moe,
    ))  # fmt: skip
    save_hf(model, tmp_path / "hf", dtype=torch.float32, extra_files=ByteTokenizer().files())
    (tmp_path / "one.txt").write_text("a text of more than sixteen bytes, so of windows")
    assert run(["trace", str(tmp_path / "hf"), "--data", str(tmp_path / "one.txt"), "--out", str(tmp_path / "t")]) == 0
    told = _json(capsys, "replay", tmp_path / "hf", tmp_path / "t")
    assert told["positions_of_equal_bits"] == told["tokens"] == 48


def test_a_run_agrees_with_itself_and_replays_to_the_bit(runs: Path, capsys):
    found = _json(capsys, "agreement", runs / "trace_a", runs / "trace_a")
    assert [row["equal"]["value"] for row in found] == [1.0, 1.0, 1.0]
    assert [part["equal"]["value"] for row in found for part in row["by_domain"].values()] == [1.0] * 3 * 3
    replayed = _json(capsys, "replay", runs / "a", runs / "trace_a")
    assert replayed["same_weights"]
    assert replayed["positions_of_equal_bits"] == replayed["tokens"] == 12 * 32
    assert replayed["loss_change"]["value"] == 0


def test_two_seeds_agree_little_and_their_routes_are_worth_less_or_more(runs: Path, capsys):
    text = _narrow(capsys, "agreement", runs / "trace_a", runs / "trace_b")
    assert "different weights" in text
    assert [line.split()[:2] for line in text.splitlines()[-9:]] == [
        [domain, layer] for domain in ("d0", "d1", "d2") for layer in ("0", "1", "all")
    ]
    replayed = _json(capsys, "replay", runs / "b", runs / "trace_a")
    assert not replayed["same_weights"]
    assert replayed["positions_of_equal_bits"] < replayed["tokens"]


def test_ablate_ranks_and_corrects_and_adds_up(runs: Path, tmp_path: Path, capsys):
    text = _narrow(capsys, "ablate", runs / "a", "--out", tmp_path)
    assert "p: Holm's, for 18 looks" in text
    told = json.loads((tmp_path / "ablation.json").read_text())
    entries = told["counterfactuals"]
    changes = [entry["change"]["value"] for entry in entries]
    assert changes == sorted(changes, reverse=True)
    assert len(entries) == 2 + 16
    assert all(entry["p_holm"] >= entry["change"]["p"] for entry in entries)
    for layer in ("0", "1"):
        single = [entry for entry in entries if entry["kind"] == "remove" and layer in entry["experts"]]
        assert sum(entry["load"] for entry in single) == pytest.approx(1)
    assert told["tokens"] == 12 * 32
    assert told["loss"] == pytest.approx(_json(capsys, "evaluate", runs / "a")["eval/loss"], rel=1e-6)


def test_a_pair_is_told_beside_the_sum_of_its_members(runs: Path, capsys):
    told = _json(capsys, "ablate", runs / "a", "--remove", "0:1,1:2", "--rest", "both")
    change = {entry["what"]: entry["change"]["value"] for entry in told["counterfactuals"]}
    for suffix in ("", ", dropped"):
        pair = next(e for e in told["counterfactuals"] if e["what"] == "layer 0, expert 1 + layer 1, expert 2" + suffix)
        beyond = pair["change"]["value"] - change["layer 0, expert 1" + suffix] - change["layer 1, expert 2" + suffix]
        assert pair["beyond_sum_of_members"]["value"] == pytest.approx(beyond, abs=1e-9)


def test_routes_are_swapped_at_equal_compute_and_for_another_runs(runs: Path, capsys):
    swaps = ["--swap", "nearest", "--swap", "next-best", "--swap", "random", "--swap", str(runs / "trace_b")]
    told = _json(capsys, "ablate", runs / "a", *swaps)
    assert len(told["counterfactuals"]) == 4 * 3
    replayed = _json(capsys, "replay", runs / "a", runs / "trace_b")
    swapped = next(e for e in told["counterfactuals"] if e["what"] == "all layers, routes of trace_b")
    assert swapped["change"]["value"] == pytest.approx(replayed["loss_change"]["value"], abs=1e-6)
    own = _json(capsys, "ablate", runs / "a", "--swap", runs / "trace_a")["counterfactuals"]
    assert all(entry["change"]["value"] == 0 and entry["p_holm"] == 1 for entry in own), "its own routes change nothing"


def test_a_traces_routes_are_swapped_on_its_text_without_reading_the_checkpoints_own(
    runs: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(source, "build_corpus_of", lambda *given: pytest.fail("reads text that nobody asks for"))
    told = _json(capsys, "ablate", runs / "a", "--swap", runs / "trace_b")
    assert told["text"] == f"of {runs / 'trace_b'}"


@pytest.mark.parametrize("study", ["rare", "alternatives"])
def test_a_study_says_its_arms_and_its_verdict(runs: Path, capsys, study: str):
    text = _narrow(capsys, "ablate", runs / "a", "--study", study)
    assert "cold less as much traffic" in text or "fragile tokens:" in text
    assert _json(capsys, "ablate", runs / "a", "--study", study)["study"] == study


def test_what_a_checkpoint_does_not_have_is_refused_before_text_or_weights_are_read(
    runs: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    a, read = str(runs / "a"), []
    monkeypatch.setattr(source, "build_corpus_of", lambda *given: read.append("text"))
    monkeypatch.setattr(moelab, "load", lambda *given, **named: read.append("weights"))
    other = tmp_path / "other_text"
    assert run(["trace", a, "--out", str(other), "--data", str(runs / "data.yaml"), "--untrained"]) == 0
    told = {
        ("--remove", "7"): "no MoE layer; there are 0, 1",
        ("--remove", "9:1"): "no MoE layer; there are 0, 1",
        ("--remove", "0:8"): "experts 0 to 7",
        ("--remove", "0:1,0:99"): "experts 0 to 7",
        ("--remove", "a:b"): "no LAYER:EXPERT",
        ("--remove", "0:" + "9" * 5000): "no LAYER:EXPERT",
        ("--swap", str(runs / "trace_three")): "replay it in a model of the same layout",
        ("--swap", str(tmp_path / "nothing")): "holds no trace",
        ("--swap", str(runs / "trace_a"), "--swap", str(other)): "is of other text than",
        ("--swap", str(runs / "trace_a"), "--tokens", "64"): "--tokens: the text is that of --swap",
        ("--swap", str(runs / "trace_a"), "--data", "train"): "--data: the text is that of --swap",
        ("--study", "rare", "--remove", "all"): "leave --remove and --swap out",
    }
    for arguments, words in told.items():
        capsys.readouterr()
        assert run(["ablate", a, *arguments]) == 2, arguments
        assert words in capsys.readouterr().err.splitlines()[-1], arguments
    assert not read


def test_bad_input_is_told_in_one_line_with_exit_code_2(runs: Path, tmp_path: Path, capsys):
    a, trace_a, three = str(runs / "a"), str(runs / "trace_a"), str(runs / "trace_three")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("trace.json", "routes.safetensors"):
        content = bytearray((runs / "trace_a" / name).read_bytes())
        if name == "routes.safetensors":
            content[-1] ^= 1
        (damaged / name).write_bytes(content)
    told = {
        ("replay", a, three): "0-2 (8 experts), and the model has 0-1 (8 experts)",
        ("replay", a, str(damaged)): "damaged or changed",
        ("replay", a, str(tmp_path / "nothing")): "holds no trace",
        ("agreement", trace_a, three): "other MoE layers",
        ("trace", a, "--out", trace_a): "is there already",
        ("trace", a, "--all", "--tokens", "3", "--out", str(tmp_path / "x")): "contradict",
        ("view", trace_a, "--tokenizer", str(tmp_path / "none"), "--out", str(tmp_path / "v")): "no file",
    }  # fmt: skip
    for arguments, words in told.items():
        capsys.readouterr()
        assert run(list(arguments)) == 2, arguments
        assert words in capsys.readouterr().err, arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"], "nothing half-written"
