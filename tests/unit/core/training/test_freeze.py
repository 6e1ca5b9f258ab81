"""What is frozen stays bit for bit, the rest learns, and a pattern that says nothing is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import moelab
from moelab.builder import build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import DataConfig, EvaluationConfig, OptimizerConfig, RunConfig, TrainConfig
from moelab.errors import ConfigError
from moelab.training.freeze import freeze
from moelab.training.optimizer import build_adamw
from moelab.training.trainer import train

SMALL = ModelConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=True,
)  # fmt: skip


def test_a_pattern_freezes_what_it_matches_and_the_optimizer_holds_the_rest():
    model = build_model(SMALL)
    frozen = freeze(model, ["layers.0.*", "norm.weight"])
    assert frozen == sorted(n for n, _ in model.named_parameters() if n.startswith("layers.0.") or n == "norm.weight")
    held = {id(p) for group in build_adamw(model, OptimizerConfig()).param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if name not in frozen}


def test_a_tied_matrix_answers_to_both_its_names():
    for name in ("lm_head.weight", "embed_tokens.weight"):
        model = build_model(SMALL)
        freeze(model, [name])
        assert not model.embed_tokens.weight.requires_grad


def test_a_pattern_that_matches_nothing_is_refused_and_so_is_freezing_all():
    with pytest.raises(ConfigError, match=r"'layers.0.mpl.\*' matches no .* the nearest name is 'layers"):
        freeze(build_model(SMALL), ["layers.0.mpl.*"])
    with pytest.raises(ConfigError, match="nothing would be trained"):
        freeze(build_model(SMALL), ["*"])


def test_a_run_leaves_frozen_routers_as_they_were_and_moves_all_else(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n} says {n * n} " * 8}) + "\n" for n in range(20)))
    layout = {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config = RunConfig(
        run_dir=str(tmp_path / "run"),
        model=dataclasses.replace(SMALL, vocab_size=300, moe=MoEConfig(layout=layout)),
        data=DataConfig(source={"name": "jsonl", "paths": [str(path)]}, validation_fraction=0.2),
        train=TrainConfig(steps=3, batch_size=2, sequence_length=16, freeze=["*.router.*"]),
        evaluation=EvaluationConfig(sequences=4, sample_tokens=0),
        observers=[],
    )
    after = dict(moelab.load(train(config)).named_parameters())
    before = dict(build_model(config.model, seed=0).named_parameters())
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert still == {name for name in before if ".router." in name}
