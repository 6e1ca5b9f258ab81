"""One stream a parameter: variants start from the same bits wherever they share a parameter."""

from __future__ import annotations

import torch

import moelab
from moelab.config.model import ModelConfig, MoEConfig


def _config(experts: int | None, **other: int) -> ModelConfig:
    moe = experts and MoEConfig(
        layout={"name": "uniform", "num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    )
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | other
    return ModelConfig(num_attention_heads=4, num_key_value_heads=2, moe=moe or None, **sizes)


def test_shared_parameters_are_bit_equal_across_variants() -> None:
    dense, sparse = moelab.build(_config(None)).state_dict(), moelab.build(_config(8)).state_dict()
    shared = [name for name in dense if "mlp" not in name]
    assert len(shared) > 20
    for name in shared:
        assert torch.equal(dense[name], sparse[name]), name


def test_more_layers_leave_the_lower_ones_as_they_were() -> None:
    short, tall = moelab.build(_config(8)).state_dict(), moelab.build(_config(8, num_hidden_layers=3)).state_dict()
    for name in short:
        assert torch.equal(short[name], tall[name]), name


def test_the_seed_decides_and_nothing_else_does() -> None:
    torch.manual_seed(1)
    first = moelab.build_model(_config(8), seed=3).state_dict()
    torch.manual_seed(2)
    same, other = (
        moelab.build_model(_config(8), seed=3).state_dict(),
        moelab.build_model(_config(8), seed=4).state_dict(),
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])


def test_building_leaves_the_global_stream_where_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    moelab.build(_config(8))
    assert torch.equal(torch.rand(3), expected)


def test_matrices_have_the_spread_asked_for_and_vectors_their_constants() -> None:
    model = moelab.build(_config(16, vocab_size=2048, hidden_size=64))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert bool((parameter == 1).all()), name
        elif name.endswith("bias"):
            assert bool((parameter == 0).all()), name
        elif parameter.numel() > 4096:
            assert abs(float(parameter.detach().std()) / 0.02 - 1) < 0.05, name
