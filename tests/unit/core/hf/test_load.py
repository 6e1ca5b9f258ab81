"""A folder is checked before it is used: each kind of damage gives one error with file, tensor and cure."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moelab import MoEContext, Registry, component, hookimpl
from moelab.builder import build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.errors import CheckpointError
from moelab.hf.load import load_hf
from moelab.hf.save import save_hf
from moelab.nn.transformer import Transformer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.layers.1.input_layernorm.weight"
EXPERT = "model.layers.0.mlp.experts.2.down_proj.weight"


def small_model(tied: bool = False) -> Transformer:
    moe = MoEConfig(
        layout={"name": "uniform", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6},
        shared_expert={"name": "gated", "intermediate_size": 10},
    )
    config = ModelConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, moe=moe,
    )  # fmt: skip
    return build_model(config)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    save_hf(small_model(), tmp_path / "whole", dtype=torch.float32)
    return tmp_path / "whole"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_hf(small_model(), tmp_path / "sharded", dtype=torch.float32, max_shard_size=8000)
    return tmp_path / "sharded"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_hf(folder)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("tied", [False, True])
def test_what_was_saved_is_loaded(tmp_path: Path, tied: bool):
    model = small_model(tied)
    save_hf(model, tmp_path / "a", dtype=torch.float32)
    loaded = load_hf(tmp_path / "a")
    assert not loaded.training
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_parameters_are_cast_to_the_dtype_asked_for_but_routers_stay_in_float32(whole: Path):
    loaded = load_hf(whole, dtype=torch.bfloat16)
    wide = {name for name, parameter in loaded.named_parameters() if parameter.dtype != torch.bfloat16}
    assert wide == {f"layers.{layer_id}.mlp.router.weight" for layer_id in (0, 1)}
    exact = load_hf(whole)
    assert torch.equal(loaded.embed_tokens.weight, exact.embed_tokens.weight.bfloat16())
    assert torch.equal(loaded.layers[0].mlp.router.weight, exact.layers[0].mlp.router.weight)


def test_a_folder_without_weights(whole: Path):
    (whole / SINGLE).unlink()
    refused(whole, str(whole), "holds neither", SINGLE, INDEX)


def test_a_folder_that_is_not_there(tmp_path: Path):
    refused(tmp_path / "nowhere", "nowhere", "no such folder")


def test_pickled_weights_are_never_opened(whole: Path, tmp_path: Path):
    """The pickle would leave a file behind if anything unpickled it."""
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (trap,))

    (whole / SINGLE).unlink()
    (whole / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(whole, "pytorch_model.bin", "does not unpickle", "save_pretrained")
    assert not trap.exists()


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(whole: Path, keep: int):
    content = (whole / SINGLE).read_bytes()
    (whole / SINGLE).write_bytes(content[:keep])
    refused(whole, str(whole / SINGLE), "truncated or damaged", "again", f"{len(content[:keep])} bytes")


@pytest.mark.parametrize("garbage", [b"\x00" * 64, b"\xff" * 64, (20).to_bytes(8, "little") + b"not json at all....."])
def test_a_garbled_header(whole: Path, garbage: bytes):
    (whole / SINGLE).write_bytes(garbage)
    refused(whole, str(whole / SINGLE), "is no whole safetensors file")


def test_an_index_naming_absent_shards(sharded: Path):
    lost = first_shard(sharded)
    lost.unlink()
    refused(sharded, INDEX, lost.name, "not there", "again")


def test_a_truncated_shard(sharded: Path):
    shard = first_shard(sharded)
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(sharded, str(shard), "truncated or damaged")


def test_a_shard_of_another_checkpoint(sharded: Path):
    one, other = sorted(sharded.glob("model-*.safetensors"))[:2]
    other.write_bytes(one.read_bytes())
    refused(sharded, str(other), "lacks", "different checkpoints")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "is not JSON"),
        ("[]", "not an object"),
        ('{"weight_map": {}}', "weight_map"),
        (json.dumps({"weight_map": {NORM: "../../model.safetensors"}}), "beside it"),
        (json.dumps({"weight_map": {NORM: 3}}), "beside it"),
        (json.dumps({"weight_map": {NORM: "pytorch_model.bin"}}), ".safetensors"),
        (json.dumps({"weight_map": {NORM: f"model-{'9' * 300}.safetensors"}}), "not there"),
    ],
)
def test_a_broken_index(sharded: Path, content: str, word: str):
    (sharded / INDEX).write_text(content)
    refused(sharded, str(sharded / INDEX), word)


def test_two_checkpoints_in_one_folder(whole: Path):
    (whole / INDEX).write_text("{}")
    refused(whole, "both", SINGLE, INDEX, "delete")


@pytest.mark.parametrize("name", [NORM, EXPERT, "lm_head.weight", "model.layers.0.mlp.gate.weight"])
def test_a_missing_tensor(whole: Path, name: str):
    edit(whole, lambda tensors: tensors.pop(name))
    refused(whole, str(whole), f"missing: {name}", "again")


@pytest.mark.parametrize("name", ["model.layers.2.input_layernorm.weight", EXPERT.replace(".2.", ".3.")])
def test_an_unexpected_tensor(whole: Path, name: str):
    edit(whole, lambda tensors: tensors.update({name: torch.zeros(16)}))
    refused(whole, str(whole / SINGLE), name, "not part of the model")


def test_a_tensor_of_another_shape(whole: Path):
    """Transposed: as many elements, other meaning."""
    edit(whole, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].t().contiguous()}))
    refused(whole, str(whole / SINGLE), EXPERT, "[6, 16]", "[16, 6]")


def test_the_shared_gate_must_be_a_matrix(whole: Path):
    name = "model.layers.0.mlp.shared_expert_gate.weight"
    edit(whole, lambda tensors: tensors.update({name: tensors[name][0].clone()}))
    refused(whole, name, "[16]", "[1, 16]")


def test_a_tensor_of_another_dtype(whole: Path):
    edit(whole, lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.int8)}))
    refused(whole, str(whole / SINGLE), NORM, "I8", "quantised")


def test_all_is_checked_before_anything_is_read(whole: Path, monkeypatch: pytest.MonkeyPatch):
    from moelab.hf.files import TensorFolder

    edit(whole, lambda tensors: tensors.pop("model.norm.weight"))
    monkeypatch.setattr(TensorFolder, "read", lambda self, name: pytest.fail(f"read {name}"))
    refused(whole, "model.norm.weight")


def test_many_problems_are_cut_to_a_readable_message(whole: Path):
    edit(whole, lambda tensors: [tensors.update({name: torch.zeros(4096)}) for name in tensors])
    with pytest.raises(CheckpointError, match=r"\.\.\. and \d+ more") as caught:
        load_hf(whole)
    assert len(str(caught.value).splitlines()) == 6


def test_a_config_that_can_not_be_built_names_the_file(whole: Path):
    fields = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(fields | {"num_experts_per_tok": 9}))
    refused(whole, str(whole / "config.json"), "num_experts_per_tok: 9 exceeds num_experts 3")


def test_a_stored_head_beside_tied_embeddings_may_be_equal_but_not_different(tmp_path: Path):
    save_hf(small_model(tied=True), tmp_path, dtype=torch.float32)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    loaded = load_hf(tmp_path)
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    edit(tmp_path, lambda tensors: tensors["lm_head.weight"][3, 4].add_(1))
    refused(tmp_path, SINGLE, "lm_head.weight", "4.x would use the embedding, 5.x this head", "remove the tensor")


def test_an_untied_checkpoint_is_not_read_as_tied(whole: Path):
    fields = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": True}))
    refused(whole, "lm_head.weight", "tie_word_embeddings to false")


class WithTable(nn.Module):
    """A stand-in for softmax_topk that keeps a buffer which no checkpoint holds."""

    def __init__(self, options: object, context: MoEContext) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(context.num_experts, context.hidden_size))
        self.register_buffer("table", torch.arange(5.0), persistent=False)


def test_a_buffer_that_is_not_stored_keeps_the_value_of_its_constructor(whole: Path, monkeypatch: pytest.MonkeyPatch):
    @dataclass
    class Options:
        norm_topk_prob: bool = False

    class Plugin:
        @hookimpl
        def moelab_routers(self) -> list:
            return [component("softmax_topk", Options, WithTable, overrides=True)]

    registry = Registry(entry_points=False)
    registry.manager.register(Plugin())
    loaded = load_hf(whole, registry)
    assert loaded.layers[1].mlp.router.table.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(loaded.layers[1].mlp.router.weight, load_hf(whole).layers[1].mlp.router.weight)
