"""Counts against the published numbers and against closed forms worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelab import ConfigError, ExpectedAssignments
from moelab.builder import build_model
from moelab.config.files import config_folder
from moelab.config.load import to_schema
from moelab.config.model import ModelConfig, MoEConfig
from moelab.moe.block import MoEBlock
from moelab.nn.count import (
    Parameters,
    cached_numbers,
    count_parameters,
    expected_assignments,
    flops_per_token,
    forward_flops_per_token,
    layer_parameters,
    served_costs,
)
from moelab.nn.transformer import Transformer


def shipped(name: str) -> Transformer:
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(OmegaConf.load(Path(config_folder()) / "model" / f"{name}.yaml"))
    assert isinstance(tree, dict)
    return build_model(to_schema(tree["model"], ModelConfig), device="meta", seed=None)


# name: total, non-embedding; of the published safetensors files and the Qwen2 report
PUBLISHED = {
    "qwen2-0.5b": (494_032_768, 357_898_112),
    "qwen2-1.5b": (1_543_714_304, 1_310_340_608),
    "qwen2-7b": (7_615_616_512, 6_525_621_760),
    "qwen2-72b": (72_706_203_648, 70_214_787_072),
    "qwen2-57b-a14b": (57_408_658_944, 56_319_581_696),
    "qwen3-30b-a3b": (30_532_122_624, 29_909_792_768),
    "mixtral-8x7b": (46_702_792_704, 46_440_648_704),
    "deepseek-v3": (671_026_404_352, 669_173_046_272),
    "deepseek-v2-lite": (15_706_484_224, 15_287_053_824),
}


@pytest.mark.parametrize(("name", "total", "non_embedding"), [(name, *counts) for name, counts in PUBLISHED.items()])
def test_shipped_configs_have_exactly_the_published_parameters(name: str, total: int, non_embedding: int):
    counts = count_parameters(shipped(name))
    assert (counts.total, counts.non_embedding) == (total, non_embedding)
    assert counts.embedding == total - non_embedding


def test_qwen2_57b_a14b_activates_exactly_the_published_parameters():
    counts = count_parameters(shipped("qwen2-57b-a14b"))
    assert counts.active == 14_249_270_784
    assert counts.active_non_embedding == 13_160_193_536
    assert counts.routed == 49_325_015_040


@pytest.mark.parametrize(("name", "active"), [("qwen3-30b-a3b", 3_353_032_704), ("mixtral-8x7b", 12_879_925_248)])
def test_other_models_activate_what_is_published(name: str, active: int):
    """Qwen3-30B-A3B: 3.3 billion; Mixtral 8x7B: 12.9 (2401.04088, section 1)."""
    assert count_parameters(shipped(name)).active == active


def test_deepseek_activates_and_caches_what_is_published():
    """V3: 37 billion, 36.7 by its README_WEIGHTS.md, which seems to leave the embedding's 0.93 out; V2-Lite: 2.4
    without its embedding. Of each token 61 (512 + 64) numbers; 128 heads of keys and values would be 71 times that.
    """
    v3, lite = shipped("deepseek-v3"), shipped("deepseek-v2-lite")
    assert count_parameters(v3).active == 37_552_282_624
    assert round((37_552_282_624 - 129_280 * 7168) / 1e9, 1) == 36.6
    assert round((count_parameters(lite).active - 102_400 * 2048) / 1e9, 2) == 2.45
    assert cached_numbers(v3) == 61 * 576
    assert 128 * (192 + 128) // 576 == 71


def test_grouped_heads_cache_a_key_and_a_value_each():
    """Qwen2-7B: 28 layers of 4 key heads of 128."""
    assert cached_numbers(shipped("qwen2-7b")) == 28 * 2 * 4 * 128


def test_qwen2_57b_a14b_flops_by_hand():
    """28 layers: q, o 3584^2; k, v 512 * 3584; router 64 * 3584; 8 experts of 2560, shared 20480, its gate 3584."""
    width = 3584
    layer = 2 * width**2 + 2 * 512 * width + 64 * width + 3 * width * (8 * 2560 + 20480) + width
    weights = 28 * layer + 151_936 * width
    expected = 2 * weights + 28 * 2 * 4096 * width
    model = shipped("qwen2-57b-a14b")
    assert forward_flops_per_token(model, 4096) == expected
    assert flops_per_token(model, 4096) == 3 * expected


def dense(tied: bool) -> Transformer:
    config = ModelConfig(
        vocab_size=100, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=6, tie_word_embeddings=tied,
    )  # fmt: skip
    return build_model(config, device="meta", seed=None)


@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_model_by_hand(tied: bool):
    """A layer: q 12x8+12, k and v 6x8+6 each, o 8x12, three 12x8, two norms of 8."""
    layer = (96 + 12) + 2 * (48 + 6) + 96 + 3 * 96 + 2 * 8
    embedding = 100 * 8 * (1 if tied else 2)
    body = 3 * layer + 8
    counts = count_parameters(dense(tied))
    assert counts == Parameters(body + embedding, body + embedding, embedding, body, body, 0)


def test_the_head_costs_the_same_tied_or_not():
    assert flops_per_token(dense(True), 10) == flops_per_token(dense(False), 10)


def test_attention_costs_half_the_square():
    """Between lengths 10 and 30: 20 / 2 keys more on average, 2 products, 2 FLOPs, 12 wide, 3 layers."""
    model = dense(False)
    assert forward_flops_per_token(model, 30) - forward_flops_per_token(model, 10) == 10 * 2 * 2 * 12 * 3


def test_dense_flops_by_hand():
    weights = 3 * (96 + 48 + 48 + 96 + 3 * 96) + 800
    assert forward_flops_per_token(dense(False), 16) == 2 * weights + 3 * 2 * 16 * 12


def test_layers_of_different_layouts_are_counted_each_by_its_own():
    """Layer 0: 4 experts of 5, top 1, gated shared of 7; layer 1: 2 experts of 3, top 2, none shared; layer 2 dense."""
    moe = MoEConfig(
        layout={
            "name": "uniform", "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 5,
            "mlp_only_layers": [2],
        },
        shared_expert={"name": "gated", "intermediate_size": 7},
        layers={
            "1": {
                "layout": {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 3},
                "shared_expert": {"name": "none"},
            }
        },
    )  # fmt: skip
    config = ModelConfig(**{**vars(dense(False).config), "moe": moe})
    sparse, plain = build_model(config, device="meta", seed=None), dense(False)
    ffn, expert_0, expert_1 = 3 * 12 * 8, 3 * 5 * 8, 3 * 3 * 8
    beside_0, beside_1 = 4 * 8 + 3 * 7 * 8 + 8, 2 * 8  # router, shared expert, its gate; router
    before, after = count_parameters(plain), count_parameters(sparse)
    assert after.routed == 4 * expert_0 + 2 * expert_1
    assert after.total - before.total == after.routed + beside_0 + beside_1 - 2 * ffn
    active = expert_0 + 2 * expert_1 + beside_0 + beside_1 - 2 * ffn
    assert after.active - before.active == active
    assert forward_flops_per_token(sparse, 9) - forward_flops_per_token(plain, 9) == 2 * active


def sparse(router: dict[str, object], **layout: object) -> Transformer:
    moe = MoEConfig(
        layout={"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 5, **layout},
        router=router,
        allow_noncausal=True,
    )
    return build_model(ModelConfig(**{**vars(dense(False).config), "moe": moe}), device="meta", seed=None)


@pytest.mark.parametrize(
    ("router", "experts"),
    [
        ({"name": "softmax_topk"}, 2),
        ({"name": "softmax_topk", "capacity_factor": 1.25}, 2),
        ({"name": "softmax_topk", "capacity_factor": 0.5}, 1),
        ({"name": "mixture_of_depths"}, 0.25),
        ({"name": "null_experts", "num_null_experts": 8}, 1),
        ({"name": "moe_plus_plus"}, 2 * 0.75 * 8 / (0.75 * 8 + 4)),
        ({"name": "expert_choice", "capacity_factor": 0.5}, 1),
        ({"name": "top_p"}, 4),
        ({"name": "remoe"}, 2),
        ({"name": "hash"}, 2),
    ],
)
def test_what_is_told_before_a_run_rests_on_what_the_router_declares(router: dict[str, object], experts: float):
    """Against the same model with its declared experts idle: three layers of experts of 3 * 5 * 8 weights."""
    model = sparse(router)
    blocks = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoEBlock)]
    assert [expected_assignments(block).per_token for block in blocks] == pytest.approx([experts] * 3)
    counts, costs = count_parameters(model), served_costs(model, 16)
    assert counts.active == counts.total - counts.routed + 3 * round(experts * 120)
    assert counts.active == costs.token_parameters + 3 * round(experts * 120)
    assert flops_per_token(model, 16) == costs.token_flops + 6 * 3 * round(experts * 120)
    assert [layer_parameters(layer)[1] for layer in model.layers] == [
        layer_parameters(layer)[0] - 8 * 120 + round(experts * 120) for layer in model.layers
    ]


@pytest.mark.parametrize("declared", [ExpectedAssignments(8.5, "too many"), ExpectedAssignments(-1, "too few"), 2.0])
def test_a_declaration_that_can_not_be_is_refused(declared: object):
    model = sparse({"name": "hash"})
    block = model.layers[1].mlp
    assert isinstance(block, MoEBlock)
    block.router.expected_assignments = declared
    with pytest.raises(ConfigError, match=r"model.moe.router, layer 1: Hash of .* declares .* in 0 \.\. 8"):
        count_parameters(model)
