"""Sizes that a config.json promises are held against what is stored, before anything is counted out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moelab.builder import build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.errors import CheckpointError
from moelab.hf.load import load_hf
from moelab.hf.save import save_hf

MODEL = ModelConfig(
    vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, moe=MoEConfig(
        layout={"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        shared_expert={"name": "gated", "intermediate_size": 8},
    ),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_hf(build_model(MODEL), tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts", 2**40), ("num_experts", 60), ("num_hidden_layers", 2**31), ("num_hidden_layers", 900),
        ("vocab_size", 2**31 - 1), ("hidden_size", 2**20), ("moe_intermediate_size", 2**40),
        ("shared_expert_intermediate_size", 2**40), ("num_attention_heads", 2**20), ("head_dim", 2**30),
    ],
)  # fmt: skip
def test_a_size_that_nothing_stored_can_have_is_named(folder: Path, key: str, value: int) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {key: value}))
    with pytest.raises(CheckpointError, match=key):
        load_hf(folder)


def test_an_empty_tensor_vouches_for_no_size(folder: Path) -> None:
    """It may have any axis, without a byte."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"x": torch.empty(2**40, 0)}, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_experts": 2**39}))
    with pytest.raises(CheckpointError, match="num_experts: 549755813888"):
        load_hf(folder)
