"""When a run evaluates, and what it leaves of it in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moelab.config.model import ModelConfig
from moelab.config.run import DataConfig, EvaluationConfig, RunConfig, TrainConfig
from moelab.data.batches import ValidationBatches
from moelab.errors import RunFailure
from moelab.registry import Registry
from moelab.training.evaluate import evaluate
from moelab.training.setup import prepare
from moelab.training.trainer import train

MODEL = ModelConfig(
    vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64,
)  # fmt: skip


class Seen:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.evaluations: list[tuple[int, dict[str, float], list[str]]] = []

    def on_evaluate(self, step: int, metrics: dict[str, float], samples: list[str]) -> None:
        self.evaluations.append((step, metrics, samples))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n} says {n * n} " * 8}) + "\n" for n in range(20)))
    return RunConfig(
        run_dir=str(tmp_path / "run"),
        model=MODEL,
        data=DataConfig(source={"name": "jsonl", "paths": [str(path)]}, validation_fraction=0.2),
        train=TrainConfig(steps=3, batch_size=2, sequence_length=16),
        evaluation=EvaluationConfig(every=2, sequences=4, sample_tokens=4, prompts=["a", "b"]),
        observers=[],
    )


def _rows(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_a_run_is_evaluated_before_its_first_step(config: RunConfig) -> None:
    seen, setup = Seen(), prepare(config, Registry())
    held_out = ValidationBatches(setup.corpus.validation, 4, 16, 2)
    untrained = evaluate(setup.model, held_out, setup.step_settings.precision).metrics()
    rows = [row for row in _rows(train(config, observers=[seen]), "metrics.jsonl") if "eval/loss" in row]
    assert [row["step"] for row in rows] == [step for step, _, _ in seen.evaluations] == [0, 2, 3]
    assert rows[0]["tokens"] == rows[0]["flops"] == rows[0]["seconds"] == 0
    for metrics in (rows[0], seen.evaluations[0][1]):
        assert {tag: metrics[tag] for tag in untrained} == pytest.approx(untrained, rel=1e-6)
    assert any(tag.startswith("eval_domain/bits_per_byte/") for tag in rows[0])
    assert {tag for tag in rows[0] if tag.startswith("eval_position/")} == {
        f"eval_position/bits_per_byte/{name}" for name in ("01", "02-03", "04-07", "08-15", "16")
    }
    assert [len(samples) for _, _, samples in seen.evaluations] == [0, 2, 2], "random weights have nothing to say"


def test_a_run_from_a_checkpoint_begins_with_what_the_checkpoint_ended_with(config: RunConfig, tmp_path: Path) -> None:
    first = train(config)
    seen = Seen()
    config.run_dir, config.train.init_from, config.seed = str(tmp_path / "second"), str(first), 5
    second = train(config, observers=[seen])
    ended = json.loads((first / "summary.json").read_text())["final"]
    begun = _rows(second, "metrics.jsonl")[0]
    assert begun["step"] == 0
    assert begun["eval/loss"] == pytest.approx(ended["eval/loss"], rel=1e-6)
    assert len(seen.evaluations[0][2]) == 2


def test_the_last_samples_lie_in_the_run_folder(config: RunConfig) -> None:
    seen = Seen()
    rows = _rows(train(config, observers=[seen]), "evaluation_samples.jsonl")
    assert [row["text"] for row in rows] == seen.evaluations[-1][2]
    assert [(row["prompt"], row["step"], row["seed"], row["temperature"]) for row in rows] == [
        ("a", 3, 0, 0.8), ("b", 3, 0, 0.8),
    ]  # fmt: skip


def test_what_a_run_ended_with_is_never_the_untrained_loss(config: RunConfig) -> None:
    """A run that fails before its next evaluation has no final one."""
    config.optimizer.lr, config.evaluation.every = 1e30, 0
    with pytest.raises(RunFailure):
        train(config)
    summary = json.loads((Path(config.run_dir) / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert not any(tag.startswith("eval") for tag in summary["final"])
