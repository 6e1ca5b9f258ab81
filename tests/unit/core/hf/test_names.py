"""Our parameters and Hugging Face's tensors map onto each other, every element once."""

from __future__ import annotations

import pytest
import torch

from moelab.builder import build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.errors import ConfigError
from moelab.hf.names import expected_tensors, hf_shapes, parameter_shapes, pieces, sparse_shapes

DENSE = ModelConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def moe(**layout: object) -> ModelConfig:
    parts = {"name": "uniform", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 5} | layout
    shared = {"name": "gated", "intermediate_size": 7}
    return ModelConfig(**{**vars(DENSE), "moe": MoEConfig(layout=parts, shared_expert=shared)})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["gate_up", "down", "router"])
def test_pieces_cover_a_parameter_exactly_once(name: str, fused: bool):
    shape = {"gate_up": (3, 10, 16), "down": (3, 5, 16), "router": (3, 16)}[name]
    ours = "layers.0.mlp.router.weight" if name == "router" else f"layers.0.mlp.experts.{name}"
    seen = torch.zeros(shape)
    for piece in pieces(ours, shape, fused=fused):
        view = piece.view(seen)
        assert tuple(view.shape) == piece.shape(shape)
        view.add_(1)
    assert (seen == 1).all()


def test_expert_matrices_lie_where_transformers_puts_them():
    """gate_up rows 0..F-1 are the gate, F..2F-1 up; down is stored transposed."""
    gate_up, down = torch.arange(480.0).view(3, 10, 16), torch.arange(240.0).view(3, 5, 16)
    stored = {
        piece.name: piece.view(tensor)
        for name, tensor in (("gate_up", gate_up), ("down", down))
        for piece in pieces(f"layers.1.mlp.experts.{name}", tuple(tensor.shape))
    }
    assert len(stored) == 9
    assert torch.equal(stored["model.layers.1.mlp.experts.2.gate_proj.weight"], gate_up[2, :5])
    assert torch.equal(stored["model.layers.1.mlp.experts.2.up_proj.weight"], gate_up[2, 5:])
    assert torch.equal(stored["model.layers.1.mlp.experts.0.down_proj.weight"], down[0].t())


def test_the_fused_layout_is_that_of_transformers_5():
    (gate_up,) = pieces("layers.1.mlp.experts.gate_up", (3, 10, 16), fused=True)
    (down,) = pieces("layers.1.mlp.experts.down", (3, 5, 16), fused=True)
    assert (gate_up.name, gate_up.shape((3, 10, 16))) == ("model.layers.1.mlp.experts.gate_up_proj", (3, 10, 16))
    assert (down.name, down.shape((3, 5, 16))) == ("model.layers.1.mlp.experts.down_proj", (3, 16, 5))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("layers.1.self_attn.q_proj.bias", "model.layers.1.self_attn.q_proj.bias"),
        ("layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.gate_proj.weight"),
        ("layers.1.mlp.router.weight", "model.layers.1.mlp.gate.weight"),
        ("layers.1.mlp.shared_expert.gate.weight", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("layers.1.mlp.shared_expert.up_proj.weight", "model.layers.1.mlp.shared_expert.up_proj.weight"),
    ],
)
def test_names_turn_into_hugging_faces(ours: str, theirs: str):
    assert [piece.name for piece in pieces(ours, (4, 4))] == [theirs]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [DENSE, moe(), moe(decoder_sparse_step=2), moe(mlp_only_layers=[0, 1])])
def test_shapes_from_the_config_alone_are_those_of_the_built_model(config: ModelConfig, tied: bool):
    config = ModelConfig(**{**vars(config), "tie_word_embeddings": tied, "head_dim": 6})
    state = build_model(config, device="meta", seed=None).state_dict()
    if tied:
        del state["lm_head.weight"]
    found = parameter_shapes(config, sparse_shapes(config))
    assert found == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert list(found) == list(state)
    assert expected_tensors(config) == hf_shapes(found)


def test_a_shared_expert_that_qwen2_moe_lacks_is_refused_by_layer():
    config = moe()
    assert config.moe is not None
    config.moe.layers = {"1": {"shared_expert": {"name": "none"}}}
    with pytest.raises(ConfigError, match=r'model.moe.layers."1".shared_expert: .*layer 1: there is none'):
        expected_tensors(config)
