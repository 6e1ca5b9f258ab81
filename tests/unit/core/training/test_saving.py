"""When a checkpoint of a run is in its place, and that one written in the background is the one written at once."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import pytest

from moelab.config.model import ModelConfig
from moelab.config.run import DataConfig, EvaluationConfig, RunConfig, TrainConfig
from moelab.errors import CheckpointError
from moelab.integrity import inspect
from moelab.training import writing
from moelab.training.trainer import train


class Saves:
    """An observer that looks at each checkpoint when it is told of it."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, step: int, path: Path) -> None:
        assert not inspect(path).problems
        self.steps.append(step)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n} says {n * n} " * 8}) + "\n" for n in range(20)))
    model = ModelConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return RunConfig(
        run_dir=str(tmp_path / "at_once"),
        model=model,
        data=DataConfig(source={"name": "jsonl", "paths": [str(path)]}, validation_fraction=0.2),
        train=TrainConfig(
            steps=5,
            batch_size=2,
            sequence_length=16,
            save_every=1,
            keep_checkpoints=0,
            keep_best=True,
            save_in_background=False,
        ),
        evaluation=EvaluationConfig(every=2, sequences=4, sample_tokens=0),
        observers=[],
    )


def _behind(config: RunConfig) -> RunConfig:
    run = dataclasses.replace(config.train, save_in_background=True)
    return dataclasses.replace(config, train=run, run_dir=str(Path(config.run_dir).parent / "behind"))


def test_what_is_written_in_the_background_is_what_is_written_at_once(config: RunConfig) -> None:
    seen = Saves()
    one, other = train(config), train(_behind(config), observers=[seen])
    assert seen.steps == [1, 2, 3, 4, 5]
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert len(files) == 12  # five checkpoints and the best one
    for file in files:
        assert (other / file).read_bytes() == (one / file).read_bytes(), file
    assert not list(other.rglob(".*"))


def test_a_save_that_fails_in_the_background_ends_the_run(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = writing.write_tensors

    def full(*arguments: object) -> object:
        if threading.current_thread().name == "checkpoint":
            raise OSError(28, "No space left on device")
        return kept(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writing, "write_tensors", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(_behind(config))
    assert not list((Path(config.run_dir).parent / "behind").rglob(".step*"))
