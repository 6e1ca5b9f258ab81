"""A built model -> Hugging Face's config.json, or every reason why that format can't hold it.

Written in transformers 4.x's style (top-level `rope_theta`, `torch_dtype`): 4.x and SGLang take 10000 for the
theta of a 5.x-style file without a word, and 5.x reads both.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

import torch

from moelab.errors import CheckpointError
from moelab.hf.config import ARCHITECTURES
from moelab.hf.loss_coefficient import aux_loss_fields
from moelab.hf.names import LM_HEAD, SparseShape, parameter_shapes, qwen2_moe_fields
from moelab.moe.block import MoEBlock
from moelab.nn.transformer import Transformer

SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


def write_config(
    model: Transformer, *, dtype: torch.dtype = torch.bfloat16, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of `model` stored in `dtype`; `extra` adds fields such as token ids.

    Raises CheckpointError with every reason, layer by layer, why Qwen2-MoE can't represent the model.
    """
    blocks = {i: layer.mlp for i, layer in enumerate(model.layers) if isinstance(layer.mlp, MoEBlock)}
    model_type = "qwen2_moe" if blocks else "qwen2"
    fields = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **_dense_fields(model),
        **(_moe_fields(model, blocks) if blocks else {}),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    _check_parameters(model, blocks, fields)
    constants = _constants() | ({"output_router_logits": False} | aux_loss_fields(model.config) if blocks else {})
    for key in extra or {}:
        if key in fields and key not in constants:
            raise ValueError(f"config_extra: {key} is decided by the model, so it can't be given")
    return dict(sorted((constants | fields | dict(extra or {})).items()))


def _constants() -> dict[str, Any]:
    """Fields that no model of ours changes, with the values of the published Qwen2 configs."""
    return {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rope_scaling": None,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _dense_fields(model: Transformer) -> dict[str, Any]:
    config = model.config
    fields: dict[str, Any] = {
        key: getattr(config, key)
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta",
            "tie_word_embeddings", "initializer_range",
        )
    }  # fmt: skip
    fields["max_window_layers"] = config.num_hidden_layers
    if config.attention_head_dim * config.num_attention_heads != config.hidden_size:
        fields["head_dim"] = config.attention_head_dim
    return fields


def _moe_fields(model: Transformer, blocks: Mapping[int, MoEBlock]) -> dict[str, Any]:
    """What all sparse layers must agree on, since config.json says each of it once."""
    reasons: list[str] = []
    chosen: dict[str, tuple[int, Any]] = {}  # field -> (the first layer that has it, its value)
    for layer_id, block in blocks.items():
        answers: list[tuple[str, dict[str, Any] | str]] = [
            ("layout", {key: getattr(block.layout, key) for key in SIZES}),
            ("router", qwen2_moe_fields(block.router)),
            ("shared expert", qwen2_moe_fields(block.shared_expert)),
        ]
        for part, answer in answers:
            if isinstance(answer, str):
                reasons.append(f"layer {layer_id}, {part}: {answer}")
                continue
            for key, value in answer.items():
                first, agreed = chosen.setdefault(key, (layer_id, value))
                if agreed != value:
                    reasons.append(f"layer {layer_id}, {part}: {key} is {value}, but {agreed} in layer {first}")
    _raise(reasons)
    step, dense = _sparse_pattern(set(blocks), model.config.num_hidden_layers)
    return {
        **{key: value for key, (_, value) in chosen.items()},
        "decoder_sparse_step": step,
        "mlp_only_layers": dense,
    }


def _sparse_pattern(sparse: set[int], num_hidden_layers: int) -> tuple[int, list[int]]:
    """decoder_sparse_step and mlp_only_layers: the widest step that meets every sparse layer, and its dense exceptions.

    Layer i is sparse when step divides i + 1, unless it is listed.
    """
    step = gcd(*(layer_id + 1 for layer_id in sparse))
    return step, [i for i in range(step - 1, num_hidden_layers, step) if i not in sparse]


def _check_parameters(model: Transformer, blocks: Mapping[int, MoEBlock], fields: Mapping[str, Any]) -> None:
    """The model holds the parameters of that config.json, no more and no less: a plugin may carry its own."""
    shape = None
    if blocks:
        keys = ("num_experts", "moe_intermediate_size", "shared_expert_intermediate_size")
        shape = SparseShape(*(int(fields[key]) for key in keys))
    expected = parameter_shapes(model.config, dict.fromkeys(blocks, shape) if shape else {})
    actual = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        actual.pop(LM_HEAD, None)
    reasons = [f"{name} {actual[name]} has no place there" for name in actual if name not in expected]
    reasons += [f"{name} {expected[name]} is needed there, and missing here" for name in expected if name not in actual]
    reasons += [
        f"{name} has shape {actual[name]}, and there {expected[name]}"
        for name in expected
        if name in actual and actual[name] != expected[name]
    ]
    _raise(reasons)


def _raise(reasons: list[str]) -> None:
    if reasons:
        listed = "".join(f"\n  - not representable because {reason}" for reason in reasons)
        raise CheckpointError(
            f"Hugging Face's Qwen2-MoE can't represent this model:{listed}\n"
            "Keep it as a moelab checkpoint, or train it with the parts that Qwen2-MoE has."
        )
