"""The layouts with experts that transformers loads and moelab reads and writes: Qwen2-MoE, Qwen3-MoE and Mixtral.

After transformers 5.23: models/{qwen2_moe,qwen3_moe,mixtral}/configuration_*.py and modeling_*.py. All three take a
softmax over all experts and then the top k; they differ in the shared expert, in normalisation, in the attention and in
names. Free of torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moelab.config.model import ModelConfig, MoEConfig
from moelab.dense_sources import WITHOUT_BIASES, Part, as_named
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
    window: int | None = None
    parts: Callable[[str, ModelConfig], list[Part]] = as_named
    stored_name: Callable[[str], str] = str  # Qwen2-MoE's name of a tensor -> its name here


def _qwen2_moe(config: ModelConfig, fields: Fields) -> None:
    config.qkv_bias = fields.number("qkv_bias", bool, True)
    config.moe = _qwen_layers(fields)
    if config.moe is not None:
        width = fields.number("shared_expert_intermediate_size", int)
        config.moe.shared_expert = {"name": "gated", "intermediate_size": width}


def _qwen3_moe(config: ModelConfig, fields: Fields) -> None:
    config.moe = _qwen_layers(fields)


def _qwen_layers(fields: Fields) -> MoEConfig | None:
    num_experts = fields.number("num_experts", int)
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


MOE_FORMATS: Mapping[str, MoEFormat] = {
    "qwen2_moe": MoEFormat(
        "Qwen2MoeForCausalLM",
        "Qwen2-MoE",
        _qwen2_moe,
        only={"attention_bias": ((True,), "Qwen2-MoE says it with qkv_bias; remove this key")},
        unused=frozenset({"qkv_bias"}),
    ),
    "qwen3_moe": MoEFormat(
        "Qwen3MoeForCausalLM",
        "Qwen3-MoE",
        _qwen3_moe,
        model={"qkv_bias": False, "use_qk_norm": True},
        only=WITHOUT_BIASES,
    ),
    "mixtral": MoEFormat(
        "MixtralForCausalLM",
        "Mixtral",
        _mixtral,
        model={"qkv_bias": False},
        defaults={"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5, "num_key_value_heads": 8},
        only={"sliding_window": ((), "moelab attends to all earlier positions; set it to null if that is right")},
        unused=frozenset({"num_local_experts", "router_jitter_noise"}),  # the noise is training's
        parts=_mixtral_parts,
        stored_name=_mixtral_name,
    ),
}
