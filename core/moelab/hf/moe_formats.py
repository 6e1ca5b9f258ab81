"""The layouts with experts that transformers loads: Qwen2-MoE, Qwen3-MoE, Mixtral, dots1, gpt-oss, DeepSeek.

After transformers 5.23: models/{qwen2_moe,qwen3_moe,mixtral,dots1}/configuration_*.py and modeling_*.py. The first
three, which are written too, take a softmax over all experts and then the top k; they differ in the shared expert, in
normalisation, in the attention and in names. dots1 is DeepSeek-V3's experts and router under Qwen3's attention; gpt-oss
has a file of its own (hf/gpt_oss.py), and so have DeepSeek-V2, V3 and Kimi K2 (hf/deepseek_formats.py).
Free of torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moelab.config.model import ModelConfig, MoEConfig
from moelab.dense_sources import Part, as_named
from moelab.hf import deepseek_formats, gpt_oss
from moelab.hf.fields import Fields


@dataclass(frozen=True)
class MoEFormat:
    """One layout; its key in `MOE_FORMATS` is the `model_type` of config.json."""

    class_name: str
    title: str  # as messages call it
    complete: Callable[[ModelConfig, Fields], None]  # reads the experts' fields into `moe`
    model: Mapping[str, Any] = field(default_factory=dict)  # as in DenseArchitecture, and so below
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    window_rule: str | None = None
    default_window: int | None = 4096
    parts: Callable[[str, ModelConfig], list[Part]] = as_named
    left_out: str = "no part of the model"  # what the tensors are that `parts` gives no name
    stored_name: Callable[[str], str] = str  # Qwen2-MoE's name of a tensor -> its name here
    has_shared: bool = False  # a gated shared expert, which must be there
    # config.json in Qwen2-MoE's fields -> in its own
    written: Callable[[Mapping[str, Any]], dict[str, Any]] = dict

    in_turns: bool = False  # experts in tensors of three axes, gate and up in turns; or packed as MXFP4
    checked: frozenset[str] = frozenset()  # fields of which `complete` refuses what it can't take
    writable: bool = True  # also a target of upcycling and of an export
    always_normalised: bool = False  # the weights of the chosen experts sum to one
    always_sparse: bool = False  # every layer has experts

    def misfits(self, *, norm_topk_prob: bool, some_dense: bool) -> list[str]:
        """Why it can't hold such a router and such layers; [] where it can."""
        found = []
        if self.always_normalised and not norm_topk_prob:
            found.append(f"the router's norm_topk_prob is false, and {self.title}'s weights sum to one")
        if self.always_sparse and some_dense:
            found.append(f"some layers are dense, and all of {self.title}'s have experts")
        return found


def _as_qwen2_moe(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`qkv_bias` only where it is not the default, which readers other than transformers assume."""
    return {key: value for key, value in fields.items() if key != "qkv_bias" or not value}


def _as_qwen3_moe(fields: Mapping[str, Any]) -> dict[str, Any]:
    absent = ("qkv_bias", "shared_expert_intermediate_size")
    return {key: value for key, value in fields.items() if key not in absent} | {"attention_bias": fields["qkv_bias"]}


def _as_mixtral(fields: Mapping[str, Any]) -> dict[str, Any]:
    absent = (
        "qkv_bias", "shared_expert_intermediate_size", "num_experts", "moe_intermediate_size", "norm_topk_prob",
        "decoder_sparse_step", "mlp_only_layers", "use_sliding_window", "max_window_layers", "layer_types",
    )  # fmt: skip
    own = {"num_local_experts": fields["num_experts"], "intermediate_size": fields["moe_intermediate_size"]}
    return {"sliding_window": None} | {key: value for key, value in fields.items() if key not in absent} | own


def _qwen2_moe(config: ModelConfig, fields: Fields) -> None:
    config.qkv_bias = fields.number("qkv_bias", bool, True)
    config.moe = _qwen_layers(fields)
    if config.moe is not None:
        width = fields.number("shared_expert_intermediate_size", int)
        config.moe.shared_expert = {"name": "gated", "intermediate_size": width}


def _qwen3_moe(config: ModelConfig, fields: Fields) -> None:
    _take_biases(config, fields)
    config.moe = _qwen_layers(fields)


def _take_biases(config: ModelConfig, fields: Fields) -> None:
    """Biases on q, k, v and o, or on none of them."""
    config.qkv_bias = config.o_bias = fields.number("attention_bias", bool, False)


def _qwen_layers(fields: Fields) -> MoEConfig | None:
    # transformers 5 writes Qwen3-MoE's as num_local_experts (attribute_map of its config)
    key = "num_experts" if fields.get("num_experts") is not None else "num_local_experts"
    num_experts = fields.number("num_experts" if fields.get(key) is None else key, int)
    if fields.get("num_local_experts", num_experts) != num_experts:
        fields.refuse("num_local_experts", f"num_experts says {num_experts}: remove the wrong one")
    if num_experts == 0:  # transformers: every layer dense
        return None
    step = fields.number("decoder_sparse_step", int, 1)
    if step < 1:
        fields.refuse("decoder_sparse_step", "it must be at least 1")
    dense = fields.get("mlp_only_layers") or []
    if not (isinstance(dense, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in dense)):
        fields.refuse("mlp_only_layers", "it must be a list of layer numbers")
    return _moe(
        {
            "num_experts": num_experts,
            "num_experts_per_tok": fields.number("num_experts_per_tok", int),
            "moe_intermediate_size": fields.number("moe_intermediate_size", int),
            "decoder_sparse_step": step,
            "mlp_only_layers": list(dense),
        },
        norm_topk_prob=fields.number("norm_topk_prob", bool, False),
    )


def _mixtral(config: ModelConfig, fields: Fields) -> None:
    counts = {
        "num_experts": fields.number("num_local_experts", int, 8),
        "num_experts_per_tok": fields.number("num_experts_per_tok", int, 2),
        "moe_intermediate_size": config.intermediate_size,
    }
    config.moe = _moe(counts, norm_topk_prob=True)


def _dots1(config: ModelConfig, fields: Fields) -> None:
    """Layers are dense up to `first_k_dense_replace`; the shared experts are one of their joint width."""
    layers, first = config.num_hidden_layers, fields.number("max_window_layers", int, config.num_hidden_layers)
    if fields.get("layer_types") is None and fields.get("sliding_window") is not None and first < layers:
        fields.refuse("max_window_layers", "moelab attends to all earlier positions in every layer")
    _take_biases(config, fields)
    dense = fields.number("first_k_dense_replace", int, 0)
    if dense >= layers:  # to transformers too: every layer dense
        return
    width, shared = fields.number("moe_intermediate_size", int), fields.number("n_shared_experts", int)
    config.moe = MoEConfig(
        layout={
            "name": "first_dense",
            "num_experts": fields.number("n_routed_experts", int),
            "num_experts_per_tok": fields.number("num_experts_per_tok", int),
            "moe_intermediate_size": width,
            "first_k_dense_replace": dense,
        },
        router={
            "name": "sigmoid_topk",
            "norm_topk_prob": fields.number("norm_topk_prob", bool, False),
            "routed_scaling_factor": fields.number("routed_scaling_factor", float, 1.0),
            "n_group": fields.number("n_group", int, 1),
            "topk_group": fields.number("topk_group", int, 1),
        },
        shared_expert={"name": "plain", "intermediate_size": width * shared},
        balance_losses=[],
    )


def _moe(layout: dict[str, Any], *, norm_topk_prob: bool) -> MoEConfig:
    """A loss is a choice of the training run, not of the weights: router_aux_loss_coef is left to its config."""
    return MoEConfig(
        layout={"name": "uniform", **layout},
        router={"name": "softmax_topk", "norm_topk_prob": norm_topk_prob},
        shared_expert={"name": "none"},
        balance_losses=[],
    )


_MIXTRAL_EXPERT = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
_MIXTRAL_GATE = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.gate\.weight")
_EXPERT = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_GATE = re.compile(r"(model\.layers\.\d+)\.mlp\.gate\.weight")
_W = {"gate": "w1", "down": "w2", "up": "w3"}
_MATRIX = {w: matrix for matrix, w in _W.items()}


def _mixtral_parts(name: str, config: ModelConfig) -> list[Part]:
    name = _MIXTRAL_GATE.sub(r"\1.mlp.gate.weight", name)
    found = _MIXTRAL_EXPERT.fullmatch(name)
    return [Part(f"{found[1]}.mlp.experts.{found[2]}.{_MATRIX[found[3]]}_proj.weight" if found else name)]


def _mixtral_name(name: str) -> str:
    name = _GATE.sub(r"\1.block_sparse_moe.gate.weight", name)
    found = _EXPERT.fullmatch(name)
    return f"{found[1]}.block_sparse_moe.experts.{found[2]}.{_W[found[3]]}.weight" if found else name


def _dots1_parts(name: str, config: ModelConfig) -> list[Part]:
    name = name.replace(".mlp.shared_experts.", ".mlp.shared_expert.")
    return [Part(name.replace(".mlp.gate.e_score_correction_bias", ".mlp.router.bias"))]


DEEPSEEK_V3 = MoEFormat(
    "DeepseekV3ForCausalLM",
    "DeepSeek-V3",
    deepseek_formats.complete_v3,
    model={"qkv_bias": False},
    defaults=deepseek_formats.SAID_V3,
    only=deepseek_formats.ONLY_V3,
    unused=deepseek_formats.UNUSED,
    parts=deepseek_formats.parts,
    left_out=deepseek_formats.LEFT_OUT,
    writable=False,
)

MOE_FORMATS: Mapping[str, MoEFormat] = {
    "qwen2_moe": MoEFormat(
        "Qwen2MoeForCausalLM",
        "Qwen2-MoE",
        _qwen2_moe,
        only={"attention_bias": ((True,), "Qwen2-MoE says it with qkv_bias; remove this key")},
        unused=frozenset({"qkv_bias"}),
        window_rule="alternate",
        has_shared=True,
        written=_as_qwen2_moe,
    ),
    "qwen3_moe": MoEFormat(
        "Qwen3MoeForCausalLM",
        "Qwen3-MoE",
        _qwen3_moe,
        model={"qkv_bias": False, "use_qk_norm": True},
        unused=frozenset({"attention_bias", "num_local_experts"}),
        window_rule="every",
        written=_as_qwen3_moe,
    ),
    "mixtral": MoEFormat(
        "MixtralForCausalLM",
        "Mixtral",
        _mixtral,
        model={"qkv_bias": False},
        defaults={"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5, "num_key_value_heads": 8},
        window_rule="plain",
        default_window=None,
        unused=frozenset({"num_local_experts", "router_jitter_noise"}),  # the noise is training's
        parts=_mixtral_parts,
        stored_name=_mixtral_name,
        written=_as_mixtral,
        always_normalised=True,
        always_sparse=True,
    ),
    "dots1": MoEFormat(
        "Dots1ForCausalLM",
        "dots1",
        _dots1,
        model={"qkv_bias": False, "use_qk_norm": True},
        unused=frozenset(
            {
                "attention_bias",
                "first_k_dense_replace",
                "n_group",
                "n_routed_experts",
                "n_shared_experts",
                "num_local_experts",
                "routed_scaling_factor",
                "scoring_func",
                "topk_group",
                "topk_method",
            }
        ),
        parts=_dots1_parts,
        writable=False,
    ),
    "gpt_oss": MoEFormat(
        "GptOssForCausalLM",
        "gpt-oss",
        gpt_oss.complete,
        model={"attention_sinks": True, "mlp_bias": True},
        defaults={
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000.0,
        },
        unused=frozenset(
            {
                "attention_bias",
                "experts_per_token",
                "initial_context_length",
                "num_local_experts",
                "swiglu_alpha",
                "swiglu_limit",
            }
        ),
        checked=frozenset({"quantization_config"}),
        window_rule="even",
        default_window=128,
        parts=gpt_oss.parts,
        in_turns=True,
        writable=False,
    ),
    "deepseek_v2": MoEFormat(
        "DeepseekV2ForCausalLM",
        "DeepSeek-V2",
        deepseek_formats.complete_v2,
        model={"qkv_bias": False},
        defaults=deepseek_formats.SAID_V2,
        only=deepseek_formats.ONLY_V2,
        unused=deepseek_formats.UNUSED,
        parts=deepseek_formats.parts,
        left_out=deepseek_formats.LEFT_OUT,
        writable=False,
    ),
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": replace(DEEPSEEK_V3, title="Kimi K2"),
}
WRITABLE = {model_type: kind for model_type, kind in MOE_FORMATS.items() if kind.writable}
