"""Latent attention: the paper's equations head by head in float64, and every way through it against that one."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moelab import ConfigError, build_model
from moelab.builder import reposition
from moelab.config.adapters import AdapterConfig
from moelab.config.latent_attention import LatentAttentionConfig
from moelab.config.model import ModelConfig
from moelab.nn.attention_entropy import attention_entropy
from moelab.nn.attention_inputs import AttentionInputs
from moelab.nn.causal_attention import causal_attention
from moelab.nn.checkpointing import apply_activation_checkpointing
from moelab.nn.count import count_parameters, forward_flops_per_token
from moelab.nn.full_attention import torch_attention
from moelab.nn.generate import generate_batch
from moelab.nn.kv_cache import KVCache
from moelab.nn.latent_attention import NORM_EPS, LatentAttention
from moelab.nn.low_rank import adapter_targets
from moelab.nn.sampling import Sampling
from moelab.nn.transformer import TokenContext, Transformer
from moelab.registry import Registry

SIZES = LatentAttentionConfig(kv_lora_rank=12, q_lora_rank=14, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
CONFIG = ModelConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=3, max_position_embeddings=64, rope_theta=100.0, qkv_bias=False, initializer_range=0.5,
    latent_attention=SIZES,
)  # fmt: skip
FULL_RANK = replace(SIZES, q_lora_rank=None, rope_interleave=False, v_head_dim=11)
YARN = {"name": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.7}
IDS = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(0))
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-6}  # norms round to fp32; in them alone sums of other orders differ


def model_of(sizes: LatentAttentionConfig = SIZES, **more: Any) -> Transformer:
    model = build_model(replace(CONFIG, latent_attention=sizes, **more)).double().eval()
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=stream))
    return model


def by_equations(attention: LatentAttention, x: Tensor, inputs: AttentionInputs) -> Tensor:
    """x [S, D] -> [S, D], one head and one query after the other, pairs as complex numbers."""
    sizes, heads = attention.sizes, attention.num_heads
    n, r, v, rank = sizes.qk_nope_head_dim, sizes.qk_rope_head_dim, sizes.v_head_dim, sizes.kv_lora_rank

    def norm(y: Tensor, weight: Tensor) -> Tensor:
        return weight * y / (y.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()

    inv_freq, factor = inputs.rope.frequencies(x.device, len(x))
    turn = torch.polar(torch.tensor(factor).double(), torch.arange(len(x))[:, None] * inv_freq.double())

    def turned(y: Tensor) -> Tensor:
        if sizes.rope_interleave:
            pairs = torch.view_as_complex(y.reshape(len(y), r // 2, 2).contiguous())
        else:
            pairs = torch.complex(y[:, : r // 2], y[:, r // 2 :])
        return torch.view_as_real(pairs * turn).flatten(1)

    if attention.q_a_proj is None:
        assert attention.q_proj is not None
        query = x @ attention.q_proj.weight.T
    else:
        query = norm(x @ attention.q_a_proj.weight.T, attention.q_a_layernorm.weight) @ attention.q_b_proj.weight.T
    both = x @ attention.kv_a_proj_with_mqa.weight.T
    latent, shared = norm(both[:, :rank], attention.kv_a_layernorm.weight), turned(both[:, rank:])
    rows = []
    for head in range(heads):
        q = query[:, head * (n + r) : (head + 1) * (n + r)]
        matrices = attention.kv_b_proj.weight[head * (n + v) : (head + 1) * (n + v)]
        key, value = latent @ matrices[:n].T, latent @ matrices[n:].T
        scores = (q[:, :n] @ key.T + turned(q[:, n:]) @ shared.T) / math.sqrt(n + r) * attention.score_factor
        rows.append(torch.stack([scores[i, : i + 1].softmax(0) @ value[: i + 1] for i in range(len(x))]))
    return torch.cat(rows, 1) @ attention.o_proj.weight.T


@pytest.mark.parametrize("sizes", [SIZES, FULL_RANK], ids=["low rank, pairs", "full rank, halves, wide values"])
@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
def test_outputs_and_gradients_are_those_of_the_papers_equations(sizes: LatentAttentionConfig, scaling: Any) -> None:
    model = model_of(sizes, rope_scaling=scaling)
    attention, inputs = model.layers[0].self_attn, model.embed(IDS[:1]).inputs
    x = torch.randn(1, 30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found, wanted = attention(x, inputs)[0], by_equations(attention, x[0], inputs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * float(wanted.detach().abs().max()))
    dy = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    parameters = list(attention.parameters())
    for got, right in zip(*(torch.autograd.grad(y, parameters, dy) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-5 * float(right.detach().abs().max()))


def test_yarn_multiplies_scores_by_the_square_of_its_mscale_over_all_dimensions() -> None:
    """0.1 mscale_all_dim ln(factor) + 1, of DeepSeek-V3's config.json: 1.8738; without it, and without yarn, 1."""
    published = {"name": "yarn", "factor": 40.0, "original_max_position_embeddings": 16, "mscale": 1.0}
    for scaling, wanted in (
        (published | {"mscale_all_dim": 1.0}, (0.1 * math.log(40) + 1) ** 2),
        (published, 1.0),
        (None, 1.0),
    ):
        assert model_of(rope_scaling=scaling).layers[1].self_attn.score_factor == pytest.approx(wanted)


def test_repositioning_changes_the_factor_too() -> None:
    model = model_of()
    reposition(model, Registry(), rope_scaling=YARN)
    assert torch.equal(model(IDS).logits, model_of(rope_scaling=YARN)(IDS).logits)


@pytest.mark.parametrize("attention", [None, {"name": "sliding_window", "window": 7}], ids=["full", "window"])
@torch.no_grad()
def test_a_cache_of_latent_vectors_continues_as_all_at_once(attention: Any) -> None:
    """In steps of one token, which read the cache as it is, and of many, which make keys and values of it."""
    model = model_of(attention=attention, rope_scaling=YARN)
    wanted = model(IDS).logits
    assert not any(layer.self_attn._absorbs(model.embed(IDS).inputs) for layer in model.layers)
    ways = set()
    for steps in ([1] * 30, [20, 1, 9], [3, 26, 1]):
        cache, parts, begin = KVCache(2), [], 0
        for count in steps:
            if begin:
                inputs = replace(model.embed(IDS[:, begin : begin + count]).inputs, past=begin)
                ways.add(model.layers[0].self_attn._absorbs(inputs))
            parts.append(model(IDS[:, begin : begin + count], cache=cache).logits)
            begin += count
        torch.testing.assert_close(torch.cat(parts, 1), wanted, **CLOSE)
        key, value = cache.held(0)
        assert (key.shape, value.shape) == ((2, 1, 30, 12 + 4), (2, 1, 30, 0)), "more than c and the rotary key"
    assert ways == {True, False}


def test_a_cache_of_another_attention_is_refused() -> None:
    cache = KVCache(2)
    build_model(replace(CONFIG, latent_attention=None, head_dim=16))(IDS, cache=cache)
    with pytest.raises(ConfigError, match="reads latent vectors, keys turned by their own positions"):
        build_model(CONFIG)(IDS, cache=cache)


@torch.no_grad()
def test_documents_packed_into_a_sequence_are_as_each_alone() -> None:
    model = model_of(rope_scaling=YARN)
    documents = torch.tensor([0] * 11 + [1] * 1 + [2] * 18).expand(2, -1)
    found = model(IDS, tokens=TokenContext(attention_id=documents)).logits
    for begin, end in ((0, 11), (11, 12), (12, 30)):
        torch.testing.assert_close(found[:, begin:end], model(IDS[:, begin:end]).logits, **CLOSE)


@torch.no_grad()
def test_texts_of_unlike_lengths_continue_together_as_alone() -> None:
    model = model_of(rope_scaling=YARN).float()
    prompts = [IDS[0, :length].tolist() for length in (3, 19, 8)]
    sampling = Sampling(max_new_tokens=9, temperature=0.0)
    together = generate_batch(model, prompts, sampling)
    for prompt, found in zip(prompts, together, strict=True):
        scores = model(torch.tensor([prompt + found.ids])).logits[0, len(prompt) - 1 : -1]
        chosen = scores.gather(1, torch.tensor(found.ids)[:, None])[:, 0]
        assert float((scores.max(1).values - chosen).max()) <= 1e-3  # a near-tie may turn


def test_recomputing_a_layer_changes_no_gradient() -> None:
    gradients = []
    for every in (None, 1):
        model = model_of().train()
        if every:
            apply_activation_checkpointing(model, every)
        model(IDS, targets=IDS.roll(-1, 1)).token_loss.sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


@torch.no_grad()
def test_its_weights_are_shown_to_who_measures_their_entropy() -> None:
    """The first query has one key; queries of zeros would have ln n, so all lie between."""
    found = attention_entropy(model_of(), IDS)
    bounds = torch.arange(1, 31, dtype=torch.float64).log()
    assert set(found) == {0, 1}
    for entropy in found.values():
        assert float(entropy[0]) == 0
        assert bool((entropy <= bounds + 1e-12).all())
        assert float(entropy[1:].min()) > 0


def test_parameters_and_flops_are_the_closed_forms() -> None:
    """A cached token is c + r numbers; a key costs n + r and v multiplications a head."""
    layer = 16 * 14 + 14 * 3 * 10 + 16 * (12 + 4) + 12 * 3 * (6 + 5) + 3 * 5 * 16
    model = build_model(CONFIG)
    own = sum(parameter.numel() for parameter in model.layers[0].self_attn.parameters())
    assert own == layer + 14 + 12
    assert count_parameters(model).total == 2 * (own + 2 * 16 + 3 * 16 * 24) + 16 + 2 * 50 * 16
    flops = 2 * (2 * (layer + 3 * 16 * 24) + 40 * 3 * (10 + 5)) + 2 * 50 * 16
    assert forward_flops_per_token(model, 40) == flops


def test_new_weights_are_those_of_other_matrices_and_norms_are_one() -> None:
    for name, parameter in build_model(CONFIG).layers[0].self_attn.named_parameters():
        if "norm" in name:
            assert bool((parameter == 1).all()), name
        else:
            assert 0.8 < float(parameter.detach().std() / 0.5) < 1.2, name


@pytest.mark.parametrize("widths", [(12, 8), (8, 12)], ids=["narrow values", "wide values"])
@pytest.mark.parametrize("kernel", ["blocks", "torch"])
def test_values_of_another_width_than_keys_have_the_same_outputs_and_gradients(
    widths: tuple[int, int], kernel: str
) -> None:
    """2 key heads for 4 query heads, against all pairs in float64."""
    stream = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 37, widths[0]), (2, 2, 37, widths[0]), (2, 2, 37, widths[1]))
    parts = [torch.randn(shape, generator=stream).double().requires_grad_() for shape in shapes]
    query, key, value = parts
    found = causal_attention(*parts) if kernel == "blocks" else torch_attention(*parts, None)
    scores = query @ key.repeat_interleave(2, 1).mT / math.sqrt(widths[0])
    hidden = torch.ones(37, 37).triu(1).bool()
    wanted = scores.masked_fill(hidden, -math.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    dy = torch.randn(wanted.shape, generator=stream).double()
    for got, right in zip(torch.autograd.grad(found, parts, dy), torch.autograd.grad(wanted, parts, dy), strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sequences", [1, 3])
def test_one_query_of_grouped_heads_sees_what_its_mask_says(sequences: int) -> None:
    """Heads of a group are rows of one product then; against all pairs in float64."""
    stream = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(sequences, h, s, 8, generator=stream).double() for h, s in ((6, 1), (2, 9), (2, 9))
    )
    mask = torch.rand(sequences, 1, 1, 9, generator=stream) < 0.6
    mask[..., -1] = True
    scores = (query @ key.repeat_interleave(3, 1).mT / math.sqrt(8)).masked_fill(~mask, -math.inf)
    wanted = scores.softmax(-1) @ value.repeat_interleave(3, 1)
    torch.testing.assert_close(torch_attention(query, key, value, mask), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_key_value_heads": 1}, "num_key_value_heads: must be 3 with latent_attention, not 1"),
        ({"head_dim": 8}, "head_dim: must be null with latent_attention, not 8"),
        ({"qkv_bias": True}, "qkv_bias: must be false with latent_attention, not true"),
        ({"use_qk_norm": True}, "use_qk_norm: must be false with latent_attention, not true"),
        ({"o_bias": True}, "o_bias: must be false with latent_attention, not true"),
        ({"attention_sinks": True}, "attention_sinks: must be false with latent_attention, not true"),
        ({"attention": {"name": "dual_chunk"}}, "'dual_chunk' turns whole heads by positions of its own"),
        ({"latent_attention": replace(SIZES, qk_rope_head_dim=3)}, "qk_rope_head_dim: rotary embedding needs an even"),
        ({"latent_attention": replace(SIZES, kv_lora_rank=0)}, "kv_lora_rank: must be in 1 .. "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_makes_no_sense_is_refused_before_anything_is_built(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build_model(replace(CONFIG, **change), device="meta", seed=None)


def test_the_config_is_unchanged_by_building() -> None:
    before = copy.deepcopy(dataclasses.asdict(CONFIG))
    build_model(CONFIG, device="meta", seed=None)
    assert dataclasses.asdict(CONFIG) == before


def test_a_layers_attention_is_one_graph_to_torchs_compiler() -> None:
    model = model_of(rope_scaling=YARN)
    state = model.embed(IDS)
    whole = torch.compile(model.layers[0].attend, backend="eager", fullgraph=True)
    for found, wanted in zip(whole(state.x, state.inputs), model.layers[0].attend(state.x, state.inputs), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_adapters_take_its_matrices_by_pattern() -> None:
    model = model_of()
    targets = adapter_targets(model, [AdapterConfig(target="*.self_attn.*_b_proj.weight", r=2)])
    assert [target.name.removeprefix("layers.0.self_attn.") for target in targets[:2]] == [
        "q_b_proj.weight", "kv_b_proj.weight",
    ]  # fmt: skip
    assert len(targets) == 4
