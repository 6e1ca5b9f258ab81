"""A built model -> Hugging Face's config.json, or every reason why that format can't hold it.

Written in transformers 4.x's style (top-level `rope_theta`, `torch_dtype`): 4.x and SGLang take 10000 for the
theta of a 5.x-style file without a word, and 5.x reads both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import gcd
from typing import Any

import torch

from moelab.config.model import ModelConfig
from moelab.errors import CheckpointError
from moelab.hf.fields import ALIKE
from moelab.hf.loss_coefficient import aux_loss_fields
from moelab.hf.moe_formats import MOE_FORMATS, WRITABLE
from moelab.hf.names import LM_HEAD, SparseShape, parameter_shapes, qwen2_moe_fields
from moelab.hf.positions import attention_fields, rope_fields
from moelab.moe.block import MoEBlock
from moelab.nn.transformer import Transformer

SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
# (biases on q, k and v; normed heads) -> the dense kind that has just these.
DENSE_KINDS = {
    (True, False): ("qwen2", "Qwen2ForCausalLM"),
    (False, False): ("llama", "LlamaForCausalLM"),  # with a window it is Mistral
    (False, True): ("qwen3", "Qwen3ForCausalLM"),
}


def write_config(
    model: Transformer, *, dtype: torch.dtype = torch.bfloat16, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of `model` stored in `dtype`; `extra` adds fields such as token ids.

    The kind is the one that the model's parts are: `model_type_of`. Raises CheckpointError with every reason, layer by
    layer, why that kind can't represent the model.
    """
    blocks = _blocks(model)
    model_type, class_name = model_type_of(model)
    _raise(_unlike_attention(model.config, model_type) + _unlike_swiglu(model, blocks), model_type)
    fields = {
        "architectures": [class_name],
        "model_type": model_type,
        **_dense_fields(model, model_type),
        **(_moe_fields(model, blocks, model_type) if blocks else {}),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    _check_parameters(model, blocks, fields, model_type)
    constants = _constants() | ({"output_router_logits": False} | aux_loss_fields(model.config) if blocks else {})
    for key in extra or {}:
        if key in fields and key not in constants:
            raise ValueError(f"config_extra: {key} is decided by the model, so it can't be given")
    return dict(sorted(WRITTEN[model_type]({**constants, **fields, **dict(extra or {})}).items()))


def model_type_of(model: Transformer) -> tuple[str, str]:
    """(model_type, transformers' class) of the kind that has the model's attention, and its shared expert or none.

    Raises CheckpointError for an attention that no kind has.
    """
    config, blocks = model.config, _blocks(model)
    if config.latent_attention is not None:
        raise CheckpointError(
            "model.latent_attention: moelab reads DeepSeek's layout and writes none with latent attention; keep it as "
            "a moelab checkpoint, or hand it to transformers by moelab.as_transformers(model)"
        )
    attention = (config.qkv_bias, config.use_qk_norm)
    if blocks:
        bare = not any(block.shared_expert is not None for block in blocks.values())
        kind = "qwen3_moe" if config.use_qk_norm else "mixtral" if bare and not config.qkv_bias else "qwen2_moe"
        if attention != (True, True) or config.o_bias:
            return kind, MOE_FORMATS[kind].class_name
    elif attention in DENSE_KINDS:
        kind, class_name = DENSE_KINDS[attention]
        windowed = kind == "llama" and config.attention is not None and config.attention["name"] == "sliding_window"
        return ("mistral", "MistralForCausalLM") if windowed else (kind, class_name)
    raise CheckpointError(
        "model.qkv_bias, model.use_qk_norm: no kind of model in Hugging Face's layout has both biases and norms on q "
        "and k; keep it as a moelab checkpoint"
    )


def _blocks(model: Transformer) -> dict[int, MoEBlock]:
    return {i: layer.mlp for i, layer in enumerate(model.layers) if isinstance(layer.mlp, MoEBlock)}


def _as_mistral(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in ("use_sliding_window", "max_window_layers")}


def _as_llama(fields: Mapping[str, Any]) -> dict[str, Any]:
    absent = ("use_sliding_window", "sliding_window", "max_window_layers")
    kept = {key: value for key, value in fields.items() if key not in absent}
    return kept | {"attention_bias": False, "mlp_bias": False}


DENSE_WINDOWS = {
    "qwen2": "late",
    "qwen3": "late",
    "mistral": "plain",
}  # DenseArchitecture.window_rule of what is written
# {model_type: config.json in Qwen2's fields -> in its own}
WRITTEN: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _as_llama,
    "mistral": _as_mistral,
    "qwen2": dict,
    "qwen3": lambda fields: {**fields, "attention_bias": False},
    **{model_type: kind.written for model_type, kind in WRITABLE.items()},
}


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


def _dense_fields(model: Transformer, model_type: str) -> dict[str, Any]:
    config = model.config
    fields: dict[str, Any] = {key: getattr(config, key) for key in ALIKE}
    fields["max_window_layers"] = config.num_hidden_layers
    rule = MOE_FORMATS[model_type].window_rule if model_type in MOE_FORMATS else DENSE_WINDOWS.get(model_type)
    fields |= rope_fields(config) | attention_fields(config, rule)
    if model_type in MOE_FORMATS:
        fields["qkv_bias"] = config.qkv_bias
    named = model_type in ("qwen3", "qwen3_moe")  # whose default is no quotient of sizes
    if named or config.attention_head_dim * config.num_attention_heads != config.hidden_size:
        fields["head_dim"] = config.attention_head_dim
    return fields


def _moe_fields(model: Transformer, blocks: Mapping[int, MoEBlock], model_type: str) -> dict[str, Any]:
    """What all sparse layers must agree on, since config.json says each of it once."""
    reasons: list[str] = []
    chosen: dict[str, tuple[int, Any]] = {}  # field -> (the first layer that has it, its value)
    for layer_id, block in blocks.items():
        answers: list[tuple[str, dict[str, Any] | str]] = [
            ("layout", {key: getattr(block.layout, key) for key in SIZES}),
            ("router", qwen2_moe_fields(block.router)),
            ("shared expert", _shared_fields(block, model_type)),
        ]
        for part, answer in answers:
            if isinstance(answer, str):
                reasons.append(f"layer {layer_id}, {part}: {answer}")
                continue
            for key, value in answer.items():
                first, agreed = chosen.setdefault(key, (layer_id, value))
                if agreed != value:
                    reasons.append(f"layer {layer_id}, {part}: {key} is {value}, but {agreed} in layer {first}")
    step, dense = _sparse_pattern(set(blocks), model.config.num_hidden_layers)
    reasons += MOE_FORMATS[model_type].misfits(
        norm_topk_prob=chosen.get("norm_topk_prob", (0, True))[1], some_dense=step != 1 or bool(dense)
    )
    _raise(reasons, model_type)
    return {
        **{key: value for key, (_, value) in chosen.items()},
        "decoder_sparse_step": step,
        "mlp_only_layers": dense,
    }


def _unlike_attention(config: ModelConfig, model_type: str) -> list[str]:
    """What of the attention the kind has no place for."""
    sinks = ["model.attention_sinks is true, and its attention has none"] if config.attention_sinks else []
    if not config.o_bias or (model_type == "qwen3_moe" and config.qkv_bias):  # its attention_bias: on all four
        return sinks
    return [*sinks, "model.o_bias is true, and its o_proj has no bias"]


def _unlike_swiglu(model: Transformer, blocks: Mapping[int, MoEBlock]) -> list[str]:
    """What of the feed-forward parts none of the kinds has a place for."""
    reasons: dict[str, None] = {}
    for layer_id, layer in enumerate(model.layers):
        mlp: Any = blocks[layer_id].experts if layer_id in blocks else layer.mlp
        answer = qwen2_moe_fields(mlp.activation)
        if isinstance(answer, str):
            reasons[answer] = None
        elif answer != {"hidden_act": "silu"}:
            reasons[f"model.activation says {answer}, and moelab writes SwiGLU alone"] = None
    if model.config.mlp_bias:
        reasons["model.mlp_bias is true, and its feed-forward layers have no biases"] = None
    if any(block.latent is not None for block in blocks.values()):
        reasons["model.moe.moe_latent_size is set, and its experts read and write the full hidden size"] = None
    return list(reasons)


def _shared_fields(block: MoEBlock, model_type: str) -> dict[str, Any] | str:
    if MOE_FORMATS[model_type].has_shared:
        return qwen2_moe_fields(block.shared_expert)
    return {} if block.shared_expert is None else f"there is one, and {MOE_FORMATS[model_type].title} has none"


def _sparse_pattern(sparse: set[int], num_hidden_layers: int) -> tuple[int, list[int]]:
    """decoder_sparse_step and mlp_only_layers: the widest step that meets every sparse layer, and its dense exceptions.

    Layer i is sparse when step divides i + 1, unless it is listed.
    """
    step = gcd(*(layer_id + 1 for layer_id in sparse))
    return step, [i for i in range(step - 1, num_hidden_layers, step) if i not in sparse]


def _check_parameters(
    model: Transformer, blocks: Mapping[int, MoEBlock], fields: Mapping[str, Any], model_type: str
) -> None:
    """The model holds the parameters of that config.json, no more and no less: a plugin may carry its own."""
    shape = None
    if blocks:
        keys = ("num_experts", "moe_intermediate_size", "shared_expert_intermediate_size")
        shape = SparseShape(*(int(fields.get(key, 0)) for key in keys))
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
    _raise(reasons, model_type)


def _raise(reasons: list[str], model_type: str) -> None:
    if reasons:
        title = MOE_FORMATS[model_type].title if model_type in MOE_FORMATS else model_type
        listed = "".join(f"\n  - not representable because {reason}" for reason in reasons)
        raise CheckpointError(
            f"Hugging Face's {title} can't represent this model:{listed}\n"
            f"Keep it as a moelab checkpoint, or train it with the parts that {title} has."
        )
