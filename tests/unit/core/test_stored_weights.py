"""Models filled from disk: the same bits as ever, into memory that is taken once."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.errors import CheckpointError
from moelab.hf.save import save_hf
from moelab.loading import open_weights
from moelab.nn import init
from moelab.stored_weights import build_empty, fill
from moelab.tensor_file import write_tensors
from moelab.tensor_parts import Part, Stored, read_block

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
        whole = Part(tmp_path / "file", name, found.offset, found.dtype, found.shape)
        first = (0,) * tensor.ndim
        plain = torch.full(tensor.shape, 9.0, dtype=wanted)
        read_block(Stored(found.shape, (whole,)), first, plain)
        assert torch.equal(plain, tensor.to(wanted))
        if tensor.ndim == 2:
            turned = torch.full((tensor.shape[1], tensor.shape[0]), 9.0, dtype=wanted)
            read_block(Stored(found.shape, (whole,)), first, turned.t())
            assert torch.equal(turned, tensor.to(wanted).t())


def test_a_block_is_read_out_of_parts_that_lie_turned_and_apart(tmp_path: Path) -> None:
    """Rows in two files, and experts' matrices of which one axis is cut in two and another turned."""
    whole = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    rows, experts = [], []
    for first in (0, 3):
        written = write_tensors(tmp_path / f"rows{first}", {"x": whole[first : first + 3]}).tensors["x"]
        at = (slice(first, first + written.shape[0]),)
        rows.append(Part(tmp_path / f"rows{first}", "x", written.offset, written.dtype, written.shape, at))
    for expert in range(4):
        for half in (slice(0, 3), slice(3, 6)):
            path = tmp_path / f"expert{expert}{half.start}"
            written = write_tensors(path, {"x": whole[expert, half].T}).tensors["x"]
            experts.append(Part(path, "x", written.offset, written.dtype, written.shape, (expert, half), True))
    for parts in (rows, experts):
        stored = Stored((4, 6, 5), tuple(parts))
        assert torch.equal(stored.read(), whole)
        for first, size in (
            ((1, 0, 0), (3, 6, 5)),
            ((2, 2, 1), (2, 3, 3)),
            ((3, 5, 4), (1, 1, 1)),
            ((4, 0, 0), (0, 6, 5)),
        ):
            block = torch.empty(size)
            read_block(stored, first, block)
            wanted = whole[tuple(slice(a, a + n) for a, n in zip(first, size, strict=True))]
            assert torch.equal(block, wanted)


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\0" * 12)
    with pytest.raises(CheckpointError, match="x: is cut short"):
        Stored((4,), (Part(tmp_path / "file", "x", 0, "F32", (4,)),)).read()
    with pytest.raises(CheckpointError, match="F4"):
        Stored((4,), (Part(tmp_path / "file", "x", 0, "F4", (4,)),)).read()


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


def test_an_empty_model_takes_no_import_of_sympy() -> None:
    """In a process of its own: torch's `empty_like` of a meta tensor imports it, 40 MB that each start would take."""
    source = (
        "import sys\n"
        "from moelab.config.model import ModelConfig\n"
        "from moelab.stored_weights import build_empty\n"
        "config = ModelConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,\n"
        "                     num_attention_heads=2, num_key_value_heads=1)\n"
        "model = build_empty(config, None, ['model.embed_tokens.weight'])\n"
        "assert not any(one.is_meta for one in model.parameters())\n"
        "print('sympy' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
