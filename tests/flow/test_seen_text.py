"""What weights were trained on travels with them: train, export, upcycle, train on, compare; and the demo's text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moelab.config.load import load_config
from moelab.config.run import RunConfig
from moelab.data.batches import TrainBatches
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.corpus import Corpus
from moelab.data.identity import split_value, text_identity
from moelab.data.seen import read_record
from moelab.registry import Registry
from moelab.training.setup import build_corpus_of, resolve_run
from moelab_tools import cli
from moelab_tools.demo import CONTINUED, UPCYCLED, demo_steps

TEXTS = [" ".join(f"word{(n * 31 + i * i) % 997}" for i in range(20)) for n in range(80)]
DEMO = Path(__file__).resolve().parent.parent.parent / "configs" / "experiments" / "demo"
MODEL = ["model.vocab_size=257", "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=1",
         "model.num_attention_heads=2", "model.num_key_value_heads=1"]  # fmt: skip
MOE = ["model.moe.layout={name: uniform, num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16}",
       "model.moe.shared_expert={name: none}"]  # fmt: skip


def moelab(*arguments: object) -> None:
    assert cli.run([str(argument) for argument in arguments]) == 0


@pytest.fixture
def train(tmp_path: Path) -> Any:
    """train("name", overrides...) -> the summary's account of seen text."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "run.yaml").write_text("data: {source: {name: jsonl, paths: [data.jsonl], deduplicate: false}}\n")

    def run(name: str, *overrides: str) -> dict[str, Any]:
        moelab(
            "train", tmp_path / "run.yaml", f"run_dir={tmp_path / name}", *MODEL, "train.steps=2", "train.batch_size=2",
            "train.sequence_length=32", "evaluation.sequences=999", "evaluation.sample_tokens=0", "observers=[]",
            *overrides,
        )  # fmt: skip
        found: dict[str, Any] = json.loads((tmp_path / name / "summary.json").read_text())["data"]["seen"]
        return found

    return run


def held_out(seed: int) -> set[int]:
    return {i for text in TEXTS if split_value(i := text_identity(text), seed) < 0.1}


def test_a_record_travels_from_training_through_export_and_upcycling(
    train: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("dense")["unknown"] == []
    dense, hf, moe = tmp_path / "dense", tmp_path / "hf", tmp_path / "moe"
    moelab("export", dense, hf, "--dtype", "float32")
    moelab("upcycle", "upcycle/qwen2_57b_a14b", f"source={hf}", f"output={moe}", "workers=1", "model.vocab_size=257",
           "model.moe.layout.moe_intermediate_size=16", "model.moe.layout.num_experts=4",
           "model.moe.layout.num_experts_per_tok=2", "model.moe.shared_expert.intermediate_size=48")  # fmt: skip
    records = [read_record(folder) for folder in (dense / "checkpoints" / "step_00000002", hf, moe)]
    assert all(record is not None and record.to_bytes() == records[0].to_bytes() for record in records)
    caplog.clear()
    shapes = ["model.moe.layout={name: uniform, num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16}",
              "model.moe.shared_expert={name: gated, intermediate_size: 48}",
              "model.moe.router={name: softmax_topk, norm_topk_prob: false}"]  # fmt: skip
    same = train("same", f"train.init_from={moe}", "data.order_seed=5", *shapes)
    assert (same["scored_trained"], same["held_out_trained"], same["unknown"]) == (0, 0, [])
    assert "training text of" not in caplog.text
    other = train("other", f"train.init_from={moe}", "data.split_seed=1", *shapes)
    assert other["held_out"] == len(held_out(1))
    assert other["held_out_trained"] == len(held_out(1) - held_out(0)) > 0
    assert other["scored_trained"] == other["scored"] - len(held_out(1) & held_out(0))
    line = f"{other['scored_trained']} of {other['scored']} held-out documents that are scored"
    assert line in caplog.text
    assert line in (tmp_path / "other" / "log.txt").read_text()
    capsys.readouterr()
    moelab("compare", tmp_path / "other", "--output", tmp_path / "report")
    assert f"other: {line}" in capsys.readouterr().out
    moelab("evaluate", moe, tmp_path / "run.yaml", "data.split_seed=1", "train.sequence_length=32", "train.steps=1",
           *MODEL)  # fmt: skip
    assert "held-out documents that are scored" in capsys.readouterr().err
    whole = read_record(tmp_path / "other" / "checkpoints" / "step_00000002")  # both runs' training text
    assert whole is not None
    assert {int(i) for i in whole.training["text"]} == {text_identity(text) for text in TEXTS} - (
        held_out(0) & held_out(1)
    )


def test_a_resumed_run_remembers_what_it_began_with(train: Any, tmp_path: Path) -> None:
    train("dense")
    settings = ("data.split_seed=1", "train.save_every=1", "train.steps=2")
    begun = train("on", f"train.init_from={tmp_path / 'dense'}", *settings)
    assert begun["held_out_trained"] > 0
    shutil.rmtree(tmp_path / "on" / "checkpoints" / "step_00000002")
    (tmp_path / "on" / "summary.json").unlink()
    resumed = train("on", "resume=true", *settings)
    assert resumed == begun | {"source": None}


def test_weights_without_a_record_may_have_seen_anything(
    train: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train("dense")
    moelab("export", tmp_path / "dense", tmp_path / "hf")
    (tmp_path / "hf" / "moelab_data.json").unlink()
    found = train("on", f"train.init_from={tmp_path / 'hf'}")
    assert found["unknown"] == [str(tmp_path / "hf")]
    assert "may have been seen" in caplog.text
    again = train("further", f"train.init_from={tmp_path / 'on'}")  # nobody forgets that on the way
    assert again["unknown"] == [str(tmp_path / "hf")]


def demo_corpus(name: str) -> tuple[Corpus, RunConfig]:
    small = ["data.source.max_bytes_per_domain=150000"]
    config = load_config([str(DEMO / f"{name}.yaml"), *small], RunConfig).config
    registry = Registry(entry_points=False)
    resolve_run(config, registry)
    return build_corpus_of(config, registry, ByteTokenizer()), config


def test_the_demo_scores_no_text_that_any_of_its_stages_trains_on() -> None:
    stages = [
        demo_corpus(name)
        for name in ("dense", "dense_continued", "dense_equal_flops", "upcycled", "upcycled_loss_free")
    ]
    trained = np.unique(np.concatenate([corpus.train.identities for corpus, _ in stages]))
    for corpus, _ in stages:
        assert corpus.validation.identities is not None
        assert not np.isin(corpus.validation.identities, trained).any()
        assert corpus.fingerprint == stages[0][0].fingerprint
    # The dense run gets a seed, and all that is trained on from it another: the order follows the seed.
    given = {
        Path(step.arguments[1]).name: [word for word in step.arguments if word.startswith("seed=")]
        for step in demo_steps(Path("runs"), [0])
        if step.arguments[0] == "train"
    }
    assert given == {"dense": ["seed=0"]} | {name: ["seed=100"] for name in (*CONTINUED, *UPCYCLED)}
    orders = [
        tuple(TrainBatches(corpus.train, config.train.batch_size, 256, seed).window_ids(0))
        for (corpus, config), seed in zip(stages, (0, 100, 100, 100, 100), strict=True)
    ]
    assert all(config.data.order_seed is None for _, config in stages)
    assert len(set(orders[1:])) == 1, "variants share their batches"
    assert orders[0] != orders[1], "and read them in another order than the dense run did"
