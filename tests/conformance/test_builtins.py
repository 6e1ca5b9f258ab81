"""Every built-in plugin passes the kit that strangers' plugins are held to. A new one is one line here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moelab
from chat_server import completion, serving
from moelab import Registry, testing
from moelab.config.model import ModelConfig
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.hf.save import save_hf
from moelab.hookspecs import (
    ACTIVATIONS,
    ATTENTIONS,
    BALANCE_LOSSES,
    DATA_SOURCES,
    DENSE_SOURCES,
    EXPERT_BACKENDS,
    EXPERT_INITIALISERS,
    EXPERT_LAYOUTS,
    GENERATORS,
    MIXERS,
    OBSERVERS,
    OPTIMIZERS,
    REWARDS,
    ROPE_SCALINGS,
    ROUTERS,
    SHARED_EXPERTS,
    SURGERIES,
    TAGGERS,
    TEXT_FILTERS,
)
from moelab.testing import initialisers
from moelab.testing.routers import CONTEXT

REGISTRY = Registry(entry_points=False)

# name -> (options, context); every registered name must be here.
ROUTER_CASES: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "softmax_topk": [
        ({}, {}),
        ({"norm_topk_prob": True, "n_group": 4, "topk_group": 2}, {}),
        ({"topk_first": True, "input_jitter": 0.1}, {}),
        ({"balance": "bias"}, {}),
        ({"balance": "quantile"}, {}),
        ({"capacity_factor": 1.0}, {}),
        ({"capacity_factor": 0.5, "drop_policy": "position", "norm_topk_prob": True}, {}),
        ({"gate_bias": True, "topk_first": True}, {}),
        ({"gate": "cosine", "cosine_size": 6, "start": "unit_rows"}, {}),
        ({"document_pool": {"smallest": 2, "largest": 4}}, {}),
        ({"document_pool": {"smallest": 3, "largest": 3, "evaluation": 3}, "balance": "bias"}, {}),
    ],
    "sigmoid_topk": [
        ({}, {}),
        ({"balance": "quantile"}, {}),
        ({"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}, {}),
        ({"balance": "proportional"}, {}),
        ({"norm_topk_prob": False, "balance": "none", "weights_on": "input"}, {"num_experts_per_tok": 1}),
    ],
    "sqrtsoftplus_topk": [({}, {}), ({"balance": "none", "token_table": {}}, {})],
    "switch": [({}, {"num_experts_per_tok": 1}), ({"capacity_factor": 1.25}, {"num_experts_per_tok": 1})],
    "gshard": [({}, {}), ({"capacity_factor": 2.0}, {})],
    "noisy_topk": [({}, {})],
    "sinkhorn": [({}, {}), ({}, {"num_experts_per_tok": 1})],
    "base": [({}, {"num_experts_per_tok": 1})],
    "hash": [({}, {})],
    "top_p": [({}, {}), ({"k_max": 2, "norm_topk_prob": True, "top_p": 0.8}, {})],
    "remoe": [({}, {}), ({"k_max": 3}, {})],
    "null_experts": [
        ({"num_null_experts": 8}, {}),
        (
            {
                "num_null_experts": 4,
                "null_output": "copy",
                "norm_topk_prob": False,
                "balance": "proportional",
                "target_experts": 1.5,
                "routed_scaling_factor": 6.0,
            },
            {},
        ),
    ],
    "moe_plus_plus": [({}, {}), ({"capacity_factor": 0.8}, {}), ({"weights": "released", "gate_layers": 2}, {})],
    "expert_choice": [({}, {}), ({"max_experts_per_token": 3}, {})],
    "expert_threshold": [({}, {}), ({"k_max": 3}, {}), ({}, {"num_experts_per_tok": 8})],
    "mixture_of_depths": [({"capacity": 0.5}, {})],
    "token_rounding": [({"tile": 2}, {}), ({"tile": 4, "rounding": "up", "norm_topk_prob": True}, {})],
    "forced_random": [({}, {})],
    "forced_round_robin": [({}, {})],
}
# name -> (options, router, router options, value at balance)
LOSS_CASES: dict[str, list[tuple[dict[str, Any], str | None, dict[str, Any], float | None]]] = {
    "load_balance": [
        ({"scope": "global"}, None, {}, 1.0),
        ({"scope": "micro"}, None, {}, 1.0),
        ({"scope": "sequence"}, None, {}, 1.0),
        ({"scope": "device", "num_devices": 4}, None, {}, 1.0),
        ({"scope": "sequence"}, "expert_choice", {}, None),
        ({"scope": "global"}, "sigmoid_topk", {"n_group": 4, "topk_group": 2}, None),
        ({"scope": "global", "count": "choices"}, "sigmoid_topk", {"n_group": 4, "topk_group": 2}, None),
        ({"scope": "sequence"}, "sigmoid_topk", {"n_group": 4, "topk_group": 2}, None),
    ],
    "hf_load_balance": [({}, None, {}, 2.0)],
    "router_z": [({}, None, {}, 4.324077125)],  # (ln 8)^2
    "importance": [({}, None, {}, 0.0)],
    "noisy_load": [({}, "noisy_topk", {}, None)],
    "entropy": [
        ({}, None, {}, 2.0794415417),  # ln 8
        ({"kind": "batch"}, None, {}, 0.0),
        ({"kind": "mutual_information"}, None, {}, 0.0),
    ],
    "router_orthogonality": [({}, None, {}, None), ({"kind": "simbal"}, None, {}, None)],
    "expert_similarity": [({}, None, {}, None)],
    "communication": [
        ({"num_devices": 4, "devices_per_token": 2}, None, {}, None),
        ({"num_devices": 4, "devices_per_token": 2, "scope": "global"}, None, {}, None),
        ({"scope": "global"}, "sigmoid_topk", {"n_group": 4, "topk_group": 2}, None),
        ({"num_devices": 4}, "null_experts", {"num_null_experts": 4}, None),
    ],
    "expert_router_coupling": [({}, None, {}, None), ({"noise": False, "alpha": 0.5}, "null_experts", {}, None)],
    "remoe_l1": [({}, "remoe", {}, None)],
    "null_load_balance": [
        ({}, "moe_plus_plus", {"gating_residual": False}, 1.0),
        ({"kind": "average"}, "null_experts", {"num_null_experts": 8}, 1.0),
        ({"convention": "moe_plus_plus"}, "moe_plus_plus", {}, 0.25),  # K / E, without null choices
        ({"kind": "device", "num_devices": 4}, "null_experts", {"num_null_experts": 8}, None),
        ({"kind": "device", "num_devices": 2, "scope": "micro"}, "null_experts", {"num_null_experts": 4}, None),
    ],
    "depth_predictor": [({}, "mixture_of_depths", {"capacity": 0.5}, None)],
}
COUNTS = {"num_experts": 8, "num_experts_per_tok": 2}
LAYOUT_CASES: dict[str, dict[str, Any]] = {
    "uniform": {**COUNTS, "moe_intermediate_size": 12, "mlp_only_layers": [2]},
    "granular": {"granularity": 4},
    "first_dense": {**COUNTS, "moe_intermediate_size": 12},
    "every_n": {**COUNTS, "moe_intermediate_size": 12},
    "per_layer": {"num_experts": [0, 4, 8, 16], "num_experts_per_tok": [2], "moe_intermediate_size": [12]},
    "pyramid": {
        "first_num_experts": 4, "last_num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "multiple_of": 4,
    },
    "heterogeneous": {**COUNTS, "widths": [4, 8, 12, 16]},
}  # fmt: skip
SHARED_CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "gated": {"intermediate_size": 20},
    "plain": {"intermediate_size": 20},
    "several": {"intermediate_size": 10, "num_experts": 3, "gated": True},
    "dense_residual": {},
}
SURGERY_CASES: dict[str, list[dict[str, Any]]] = {
    "grow": [{"num_experts": 16, "num_experts_per_tok": 4}, {"num_experts": 11, "by": "load", "noise": 0.1}],
    "split": [{}, {"parts": 3, "order": "random"}],
    "merge": [{"num_experts": 5}, {"num_experts": 3, "by": "coactivation", "grouping": "dominant", "align": False}],
    "prune": [{"num_experts": 6}, {"experts": [1, 7]}, {"num_experts": 3, "by": "knockout"}],
    "revive": [{}, {"experts": [2]}],
    "top_k": [{"num_experts_per_tok": 3}],
}
ACTIVATION_CASES: dict[str, list[tuple[dict[str, Any], Callable[..., Tensor]]]] = {
    "swiglu": [({}, lambda g, u: g / (1 + torch.exp(-g)) * u)],
    "relu": [({}, lambda u: torch.where(u > 0, u, torch.zeros_like(u)))],
    "gelu": [
        ({}, lambda u: u * (1 + torch.erf(u / math.sqrt(2))) / 2),
        ({"approximate": "tanh"}, lambda u: u / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))),
    ],
    "relu2": [({}, lambda u: torch.where(u > 0, u**2, torch.zeros_like(u)))],
    "clamped_swiglu": [
        ({}, lambda g, u: _clamped(g, u, 7.0)),
        ({"swiglu_limit": 1.0}, lambda g, u: _clamped(g, u, 1.0)),
    ],
    "situ_glu": [
        ({}, lambda g, u: _capped(g, u, 4.0, 25.0)),
        ({"gate_cap": 1.5, "up_cap": 2.0}, lambda g, u: _capped(g, u, 1.5, 2.0)),
    ],
}


def _clamped(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    g, u = torch.minimum(gate, torch.tensor(limit)), torch.clamp(up, -limit, limit)
    return (u + 1) * g / (1 + torch.exp(-1.702 * g))


def _capped(gate: Tensor, up: Tensor, gate_cap: float, up_cap: float) -> Tensor:
    return gate_cap * torch.tanh(gate / gate_cap) / (1 + torch.exp(-gate)) * up_cap * torch.tanh(up / up_cap)


# name -> (options, definition): the last from positions within a document, as `testing.attentions.Definition`.
ATTENTION_CASES: dict[str, list[tuple[dict[str, Any], Callable[..., Any]]]] = {
    "full": [({}, lambda i, j: (i - j, j <= i, torch.ones(())))],
    "sliding_window": [
        ({"window": 7}, lambda i, j: (i - j, i - j < 7, torch.ones(()))),
        ({"window": 7, "layers": "0"}, lambda i, j: (i - j, i - j < 7, torch.ones(()))),
    ],
    "dual_chunk": [
        ({}, lambda i, j: dual_chunk_distance(i, j, 12, 4, 15)),
        ({"preset": "qwen_1m", "local": 5}, lambda i, j: dual_chunk_distance(i, j, 11, 5, 16)),
        (
            {"preset": None, "chunk": 8, "local": 3, "max_position": 12},
            lambda i, j: dual_chunk_distance(i, j, 8, 3, 12),
        ),
        (
            {"temperature": "static", "factor": 4.0},
            lambda i, j: (*dual_chunk_distance(i, j, 12, 4, 15)[:2], torch.tensor((0.1 * math.log(4) + 1) ** 2)),
        ),
        (
            {"temperature": "per_query"},
            lambda i, j: (
                *dual_chunk_distance(i, j, 12, 4, 15)[:2],
                (0.1 * ((i + 1) / 16).clamp(min=1).log() + 1).square(),
            ),
        ),
    ],
}
ROPE_SCALING_CASES: dict[str, tuple[dict[str, Any], Callable[..., float]]] = {
    "none": ({}, lambda k, c, n: c.rope_theta ** (-2 * k / c.head_dim)),
    "linear": ({"factor": 4.0}, lambda k, c, n: c.rope_theta ** (-2 * k / c.head_dim) / 4),
    "dynamic": (
        {"factor": 2.0},
        lambda k, c, n: (c.rope_theta * (2 * max(n, 64) / 64 - 1) ** (16 / 14)) ** (-2 * k / c.head_dim),
    ),
    # Turns over 64 positions: 10.2 of the fastest, so none is kept whole; less than one from k = 3 on.
    "yarn": ({"factor": 4.0}, lambda k, c, n: c.rope_theta ** (-k / 8) * (1 - min(k / 3, 1) * 0.75)),
    "llama3": (
        {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        lambda k, c, n: llama3_frequency(c.rope_theta ** (-k / 8)),
    ),
}


def dual_chunk_distance(i: torch.Tensor, j: torch.Tensor, s: int, w: int, most: int) -> tuple[torch.Tensor, ...]:
    """Dual Chunk Attention (2402.17463), eq. 2 to 7: what a query at i takes a key at j to be away."""
    back, inside = i // s - j // s, i % s
    before = torch.where(inside < w, s + inside, most)
    place = torch.where(back == 0, inside, torch.where(back == 1, before, most))
    return place - j % s, j <= i, torch.ones(())


def llama3_frequency(plain: float) -> float:
    kept = min(max((64 * plain / (2 * math.pi) - 1) / 3, 0), 1)
    return plain * (kept + (1 - kept) / 4)


@pytest.mark.parametrize(
    ("point", "cases"),
    [
        (ATTENTIONS, ATTENTION_CASES),
        (ROPE_SCALINGS, ROPE_SCALING_CASES),
        (ACTIVATIONS, ACTIVATION_CASES),
        (ROUTERS, ROUTER_CASES),
        (BALANCE_LOSSES, LOSS_CASES),
        (EXPERT_LAYOUTS, LAYOUT_CASES),
        (SHARED_EXPERTS, SHARED_CASES),
        (SURGERIES, SURGERY_CASES),
    ],
)
def test_no_builtin_escapes_the_kit(point: Any, cases: dict[str, Any]) -> None:
    assert set(REGISTRY.components(point)) == set(cases)


@pytest.mark.parametrize("check", testing.ROUTER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    ("name", "options", "context"),
    [(name, *case) for name, cases in ROUTER_CASES.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()),
)
def test_a_router_conforms(
    name: str, options: dict[str, Any], context: dict[str, Any], check: Callable[[testing.RouterCase], None]
) -> None:
    component = REGISTRY.components(ROUTERS)[name]
    check(testing.RouterCase(component, options, replace(CONTEXT, **context)))


@pytest.mark.parametrize("check", testing.BALANCE_LOSS_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    ("name", "options", "router", "router_options", "balanced"),
    [(name, *case) for name, cases in LOSS_CASES.items() for case in cases],
)
def test_a_balance_loss_conforms(
    name: str,
    options: dict[str, Any],
    router: str | None,
    router_options: dict[str, Any],
    balanced: float | None,
    check: Callable[[testing.BalanceLossCase], None],
) -> None:
    component = REGISTRY.components(BALANCE_LOSSES)[name]
    source = None if router is None else REGISTRY.components(ROUTERS)[router]
    check(testing.BalanceLossCase(component, options, source, router_options, balanced=balanced))


@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_a_layout_conforms(name: str) -> None:
    testing.check_expert_layout(REGISTRY.components(EXPERT_LAYOUTS)[name], LAYOUT_CASES[name])


@pytest.mark.parametrize("name", SHARED_CASES)
def test_a_shared_expert_conforms(name: str) -> None:
    testing.check_shared_expert(REGISTRY.components(SHARED_EXPERTS)[name], SHARED_CASES[name])


@pytest.mark.parametrize("check", testing.ATTENTION_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    ("name", "options", "definition"), [(name, *case) for name, cases in ATTENTION_CASES.items() for case in cases]
)
def test_an_attention_conforms(
    name: str,
    options: dict[str, Any],
    definition: Callable[..., Any],
    check: Callable[[testing.AttentionCase], None],
) -> None:
    check(testing.AttentionCase(REGISTRY.components(ATTENTIONS)[name], options, definition=definition))


@pytest.mark.parametrize("name", ROPE_SCALING_CASES)
def test_a_rope_scaling_conforms(name: str) -> None:
    options, reference = ROPE_SCALING_CASES[name]
    testing.check_rope_scaling(REGISTRY.components(ROPE_SCALINGS)[name], options, reference)


@pytest.mark.parametrize("check", testing.ACTIVATION_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    ("name", "options", "reference"), [(name, *case) for name, cases in ACTIVATION_CASES.items() for case in cases]
)
def test_an_activation_conforms(
    name: str,
    options: dict[str, Any],
    reference: Callable[..., Tensor],
    check: Callable[[testing.ActivationCase], None],
) -> None:
    check(testing.ActivationCase(REGISTRY.components(ACTIVATIONS)[name], options, reference))


@pytest.mark.parametrize("name", sorted(set(REGISTRY.components(EXPERT_BACKENDS)) - {"auto"}))
def test_a_backend_conforms(name: str) -> None:
    """`auto` is left out: it only chooses among the others."""
    testing.check_backend(REGISTRY.components(EXPERT_BACKENDS)[name])


@pytest.mark.parametrize("name", sorted(REGISTRY.components(EXPERT_INITIALISERS)))
def test_an_expert_initialiser_conforms(name: str) -> None:
    testing.check_initialiser(REGISTRY.components(EXPERT_INITIALISERS)[name], **INITIALISER_SIZES.get(name, {}))


PHI3 = {
    "model.embed_tokens.weight": (50, 24), "model.norm.weight": (24,),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {
            "input_layernorm.weight": (24,), "post_attention_layernorm.weight": (24,),
            "self_attn.qkv_proj.weight": (40, 24), "self_attn.o_proj.weight": (24, 24),
            "mlp.gate_up_proj.weight": (40, 24), "mlp.down_proj.weight": (24, 20),
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REGISTRY.components(DENSE_SOURCES)))
def test_a_dense_source_conforms(name: str) -> None:
    testing.check_dense_source(REGISTRY.components(DENSE_SOURCES)[name], stored={"phi3": PHI3}.get(name))


TRACKERS = {"wandb", "trackio"}  # need their clients: tests/optional/test_trackers.py


@pytest.mark.parametrize("name", sorted(REGISTRY.components(OBSERVERS).keys() - TRACKERS))
def test_an_observer_conforms(name: str) -> None:
    testing.check_observer(REGISTRY.components(OBSERVERS)[name])


@pytest.mark.parametrize("name", ["text", "jsonl"])
def test_a_data_source_conforms(name: str, tmp_path: Path) -> None:
    """`embedded` reads what is installed, and `tokens` tokens: their own tests do."""
    texts = [f"Document number {n} says {n * n}." for n in range(20)]
    if name == "text":  # a file is a document
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.txt").write_text(text)
    else:
        (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"paths": [str(tmp_path if name == "text" else tmp_path / "all.jsonl")]}
    testing.check_data_source(REGISTRY.components(DATA_SOURCES)[name], options)


@pytest.mark.parametrize("name", sorted(REGISTRY.components(MIXERS)))
def test_a_mixer_conforms(name: str) -> None:
    options = {"weights": {"code": 3, "prose": 1}} if name == "weights" else None
    testing.check_mixer(REGISTRY.components(MIXERS)[name], options)


MERGED = {"reference": "there", "before": "here", "alpha": 1e-3}
OPTIMIZER_CASES: dict[str, list[dict[str, Any]]] = {
    "adamw": [{}],
    "muon": [{}, {"adjust_lr_fn": "original", "nesterov": False, "ns_dtype": "float32"}],
    "online_merging": [
        MERGED,
        {**MERGED, "reserve_rate": 0.5, "merge_every": 2, "merge_routers": True},
        {**MERGED, "method": "onties", "reserve_rate": 0.4},
        {**MERGED, "method": "onties", "reserve_rate": 0.4, "compat": "official", "tau_dtype": "bfloat16"},
        {**MERGED, "reserve_rate": 0.5, "compat": "official"},
    ],
}


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in REGISTRY.components(OPTIMIZERS) for options in OPTIMIZER_CASES[name]],
    ids=str,
)
def test_an_optimizer_conforms(name: str, options: dict[str, Any]) -> None:
    testing.check_optimizer(REGISTRY.components(OPTIMIZERS)[name], options)


# Need a package, and a model: tests/optional/test_datatrove.py, tests/unit/plugins/text_filters/
WITH_MORE = {"datatrove", "perplexity"}


@pytest.mark.parametrize("name", sorted(REGISTRY.components(TEXT_FILTERS).keys() - WITH_MORE))
def test_a_text_filter_conforms(name: str, tmp_path: Path) -> None:
    (tmp_path / "asked.txt").write_text("The cat sat on the mat")
    for kind, word in (("wanted", "cat"), ("other", "number")):
        rows = [json.dumps({"text": f"The {word} {n} sat {n * n}"}) for n in range(40)]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(rows))
    options = {
        "decontaminate": {"against": ["asked.txt"], "words": 3},
        "classifier": {"wanted": ["wanted.jsonl"], "other": ["other.jsonl"]},
    }
    testing.check_text_filter(REGISTRY.components(TEXT_FILTERS)[name], options.get(name), base=tmp_path)


@pytest.mark.parametrize("name", sorted(REGISTRY.components(TAGGERS)))
def test_a_tagger_conforms(name: str, tmp_path: Path) -> None:
    testing.check_tagger(REGISTRY.components(TAGGERS)[name], base=tmp_path)


# Need a trained head, and a package: tests/optional/test_align.py, tests/optional/test_reasoning_gym.py
LEARNED_OR_LENT = {"reward_model", "reasoning_gym"}


@pytest.mark.parametrize("name", sorted(REGISTRY.components(REWARDS).keys() - LEARNED_OR_LENT))
def test_a_reward_conforms(name: str) -> None:
    options = {
        "doctest": {"allow_code_execution": True}, "format": {"contains": ["4"], "json": True}, "length": {"most": 9}
    }  # fmt: skip
    testing.check_reward(REGISTRY.components(REWARDS)[name], options.get(name))


@pytest.mark.parametrize("name", sorted(REGISTRY.components(GENERATORS)))
def test_a_generator_conforms(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed for each question, and random numbers that stand between no two tokens by a rounding."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = moelab.build(ModelConfig(vocab_size=257, num_key_value_heads=1, initializer_range=0.3, **sizes))
    save_hf(model, tmp_path / "hf", dtype=torch.float32, extra_files=ByteTokenizer().files())
    with serving(lambda body, headers: completion(f"{body['messages'][-1]['content']} {body['seed']}")) as url:
        options = {
            "checkpoint": {"path": str(tmp_path / "hf"), "max_new_tokens": 6, "temperature": 1.0},
            "server": {"url": url, "model": "m"},
        }
        testing.check_generator(REGISTRY.components(GENERATORS)[name], options[name], base=tmp_path)


# Whole copies are as wide as the dense layer of the kit, pieces make it up, and a mixture has several sources.
INITIALISER_SIZES = {
    "sparse": {"width": initialisers.DENSE},
    "deltas": {"width": initialisers.DENSE},
    "split": {"width": initialisers.DENSE // 6},
    "mix": {"width": initialisers.DENSE, "num_sources": 2},
}


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, cases in SURGERY_CASES.items() for options in cases], ids=str
)
def test_a_surgery_conforms(name: str, options: dict[str, Any]) -> None:
    testing.check_surgery(REGISTRY.components(SURGERIES)[name], options)
