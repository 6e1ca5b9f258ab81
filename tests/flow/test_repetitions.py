"""Repetitions of an upcycling, from dense sources of other seeds on: compare finds them, and pairs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moelab_tools import cli

TEXTS = [" ".join(f"word{(n * 31 + i * i) % 997}" for i in range(20)) for n in range(80)]
MODEL = ["model.vocab_size=257", "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=1",
         "model.num_attention_heads=2", "model.num_key_value_heads=1"]  # fmt: skip
MOE = ["model.moe.layout={name: uniform, num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16}",
       "model.moe.shared_expert={name: gated, intermediate_size: 48}",
       "model.moe.router={name: softmax_topk, norm_topk_prob: false}"]  # fmt: skip
UPCYCLED = ["model.vocab_size=257", "model.moe.layout.moe_intermediate_size=16", "model.moe.layout.num_experts=4",
            "model.moe.layout.num_experts_per_tok=2", "model.moe.shared_expert.intermediate_size=48"]  # fmt: skip


def moelab(*arguments: object) -> None:
    assert cli.run([str(argument) for argument in arguments]) == 0


def train(folder: Path, name: str, seed: int, *overrides: str) -> None:
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "run.yaml").write_text("data: {source: {name: jsonl, paths: [data.jsonl], deduplicate: false}}\n")
    moelab(
        "train", folder / "run.yaml", f"run_dir={folder / name}", f"seed={seed}", *MODEL, "train.steps=2",
        "train.batch_size=2", "train.sequence_length=32", "evaluation.sequences=999",
        "evaluation.sample_tokens=0", "observers=[]", *overrides,
    )  # fmt: skip


def test_runs_that_read_other_weights_of_one_recipe_are_one_variant(tmp_path: Path) -> None:
    merging = "optimizer.algorithm={name: online_merging, reference: %s, before: %s}"
    for seed in range(2):
        dense, tuned = tmp_path / f"dense_{seed}", tmp_path / f"tuned_{seed}"
        train(tmp_path, dense.name, seed)
        train(tmp_path, tuned.name, 5 + seed, f"train.init_from={dense}")
        train(tmp_path, f"merged_{seed}", 9, f"train.init_from={tuned}", merging % (tuned, dense))
        # another base than its own past: seeds of its own
        train(tmp_path, f"apart_{seed}", 9, f"train.init_from={dense}", merging % (tuned, dense))
    runs = [tmp_path / f"{name}_{seed}" for name in ("merged", "apart") for seed in range(2)]
    moelab("compare", *runs, "--output", tmp_path / "report")
    found: dict[str, Any] = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert {line["name"]: sorted(map(str, line["seeds"])) for line in found["variants"]} == {
        "merged": [f"9, source seed {seed}, seed {5 + seed}" for seed in range(2)],
        "apart": [f"9, source seed {seed} (2 times), seed {5 + seed}" for seed in range(2)],
    }


@pytest.mark.slow
def test_other_seeds_of_source_and_conversion_are_one_variant_and_pairs(tmp_path: Path) -> None:
    for seed in range(3):
        train(tmp_path, f"dense_{seed}", seed)
        source, output = tmp_path / f"hf_{seed}", tmp_path / f"moe_{seed}"
        moelab("export", tmp_path / f"dense_{seed}", source, "--dtype", "float32")
        moelab("upcycle", "upcycle/qwen2_57b_a14b", f"source={source}", f"output={output}", "workers=1",
               f"seed={10 + seed}", *UPCYCLED)  # fmt: skip
        train(tmp_path, f"upcycled_{seed}", seed, f"train.init_from={output}", *MOE)
        train(tmp_path, f"continued_{seed}", seed, f"train.init_from={source}")
    runs = [tmp_path / f"{name}_{seed}" for name in ("upcycled", "continued") for seed in range(3)]
    moelab("compare", *runs, "--baseline", "continued", "--output", tmp_path / "report")
    found: dict[str, Any] = json.loads((tmp_path / "report" / "comparison.json").read_text())
    lines = {line["name"]: line for line in found["variants"]}
    assert sorted(lines) == ["continued", "upcycled"]
    assert sorted(map(str, lines["upcycled"]["seeds"])) == [
        f"{seed}, source seed {seed}, conversion seed {10 + seed}" for seed in range(3)
    ]
    assert (lines["upcycled"]["difference"]["pairs"], lines["upcycled"]["difference"]["paired"]) == (3, True)
