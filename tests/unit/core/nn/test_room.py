"""A model that no memory here can hold is refused by its count, before a byte is asked for."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from moelab.builder import build_model
from moelab.config.model import ModelConfig
from moelab.errors import ConfigError
from moelab.nn.room import check_room, memory_of


def _model(width: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=100, hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip


def test_a_model_of_terabytes_is_refused_with_its_count() -> None:
    model = build_model(_model(1 << 20), device="meta", seed=None)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(ConfigError, match=f"model: its {numbers:,} parameters take"):
        check_room(model, "cpu")


def test_training_needs_four_times_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(_model(16), device="meta", seed=None)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr("moelab.nn.room.memory_of", lambda device: 3 * weights)
    check_room(model, "cpu")
    with pytest.raises(ConfigError, match="with gradients and moments"):
        check_room(model, "cpu", 2 * weights)


def test_processes_that_share_a_model_out_need_their_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine's memory as many parts as processes run there; of an accelerator's one."""
    model = build_model(_model(16), device="meta", seed=None)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr("moelab.nn.room.memory_of", lambda device: 3 * weights)
    check_room(model, "cpu", 2 * weights, shard=8, beside=4)
    check_room(model, "cuda", 2 * weights, shard=2, beside=2)
    with pytest.raises(ConfigError, match="of it here"):
        check_room(model, "cpu", 2 * weights, shard=8, beside=8)


def test_a_process_counts_with_the_least_of_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (12345, -1))
    assert memory_of(torch.device("cpu")) == 12345
    assert memory_of(torch.device("meta")) is None


def test_a_model_without_numbers_is_built_without_sympy() -> None:
    """Which takes a second to import, and every command that asks for shapes alone builds one."""
    code = (
        "import sys; from moelab.builder import build_model; from moelab.config.model import ModelConfig;"
        "build_model(ModelConfig(64, 32, 32, 1, 2, 2), device='meta', seed=None); print('sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
