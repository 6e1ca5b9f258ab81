"""Models filled from disk: the same bits as ever, into memory that is taken once."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moelab
from moelab.checkpoint import READING
from moelab.config.model import ModelConfig, MoEConfig
from moelab.errors import CheckpointError
from moelab.hf.save import save_hf
from moelab.loading import open_weights
from moelab.nn import init
from moelab.stored_weights import build_empty, fill
from moelab.tensor_file import write_tensors
from moelab.tensor_values import read_values

SPARSE = ModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
    moe=MoEConfig(
        layout={"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        router={"name": "softmax_topk", "norm_topk_prob": False},
        shared_expert={"name": "gated", "intermediate_size": 24},
    ),
)  # fmt: skip


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_values_are_read_as_torch_converts_them(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    """Contiguous or not, of the same type or of another, scalars and empty ones."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).to(stored)
        for name, shape in {"matrix": (5, 7), "scalar": (), "empty": (0, 3)}.items()
    }
    written = write_tensors(tmp_path / "file", tensors)
    for name, tensor in tensors.items():
        found = written.tensors[name]
        plain = torch.full(tensor.shape, 9.0, dtype=wanted)
        read_values(tmp_path / "file", found.offset, found.dtype, plain, READING)
        assert torch.equal(plain, tensor.to(wanted))
        if tensor.ndim == 2:
            turned = torch.full((tensor.shape[1], tensor.shape[0]), 9.0, dtype=wanted)
            read_values(tmp_path / "file", found.offset, found.dtype, turned.t(), READING)
            assert torch.equal(turned, tensor.to(wanted).t())


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\0" * 12)
    with pytest.raises(CheckpointError, match="ends 4 bytes before"):
        read_values(tmp_path / "file", 0, "F32", torch.empty(4), READING)
    with pytest.raises(CheckpointError, match="F4"):
        read_values(tmp_path / "file", 0, "F4", torch.empty(4), READING)


def test_nothing_is_drawn_for_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is memory taken by a constructor: the model stands on the meta device until it is filled."""
    save_hf(moelab.build(SPARSE, seed=3), tmp_path / "hf", dtype=torch.float32)
    weights = open_weights(tmp_path / "hf")

    def draw(tensor: Tensor, *_: object, **__: object) -> Tensor:
        assert isinstance(tensor, Tensor), "a stream was opened"
        assert tensor.is_meta, "something was drawn"
        return tensor

    monkeypatch.setattr(init, "generator", draw)
    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(Tensor, name, draw)
    model = build_empty(SPARSE, None, weights.shapes, seed=1)
    fill(model, weights)
    monkeypatch.undo()
    for name, tensor in moelab.build(SPARSE, seed=3).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_what_is_not_stored_is_as_the_seed_gives_it(tmp_path: Path) -> None:
    """A router with state of its own, on weights of one without: as a model drawn whole and then overwritten."""
    save_hf(moelab.build(SPARSE, seed=3), tmp_path / "hf", dtype=torch.float32)
    other = copy.deepcopy(SPARSE)
    assert other.moe is not None
    other.moe.router = {"name": "expert_choice"}
    other.moe.allow_noncausal = True
    weights = open_weights(tmp_path / "hf")
    model = build_empty(other, None, weights.shapes, seed=5)
    fill(model, weights)
    wanted = moelab.build(other, seed=5).state_dict() | moelab.build(SPARSE, seed=3).state_dict()
    assert model.state_dict().keys() == wanted.keys() > weights.shapes.keys()
    for name, tensor in wanted.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    tied = dataclasses.replace(SPARSE, tie_word_embeddings=True)
    save_hf(moelab.build(tied, seed=3), tmp_path / "hf", dtype=torch.bfloat16)
    weights = open_weights(tmp_path / "hf")
    assert "lm_head.weight" not in weights.shapes
    model = build_empty(tied, None, weights.shapes, dtype=torch.bfloat16)
    fill(model, weights)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.embed_tokens.weight, moelab.build(tied, seed=3).embed_tokens.weight.bfloat16())
