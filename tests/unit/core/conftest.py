"""A run of a few steps on a few sentences, for tests of what becomes of runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moelab.config.model import ModelConfig
from moelab.config.run import DataConfig, EvaluationConfig, RunConfig, TrainConfig

MODEL = ModelConfig(
    vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture
def small_run(tmp_path: Path) -> RunConfig:
    """Six steps of a dense model, evaluated every second one."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n} says {n * n} " * 8}) + "\n" for n in range(20)))
    return RunConfig(
        run_dir=str(tmp_path / "run"),
        model=MODEL,
        data=DataConfig(source={"name": "jsonl", "paths": [str(path)]}, validation_fraction=0.2),
        train=TrainConfig(steps=6, batch_size=2, sequence_length=16, save_every=2, threads=1, log_every=2),
        evaluation=EvaluationConfig(every=2, sequences=4, sample_tokens=0),
        observers=[],
    )
