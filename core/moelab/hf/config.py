"""Hugging Face's config.json of Qwen2ForCausalLM and Qwen2MoeForCausalLM -> ModelConfig.

Read as transformers 4.x writes it (`rope_theta`, `torch_dtype`) and as 5.x does (`rope_parameters`, `dtype`).
What this decoder would compute differently is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from moelab.config.model import ModelConfig, MoEConfig
from moelab.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.json"
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}
HF_ROPE_THETA = 10_000.0  # transformers' default where config.json names none; Qwen2's own is 1e6
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id")

T = TypeVar("T", int, float, bool)


def read_config(folder: Path) -> ModelConfig:
    """The model that `folder/config.json` describes.

    Raises CheckpointError naming file, key, found value and what would do.
    """
    fields = _Fields.read(folder / CONFIG_FILE)
    model_type = _model_type(fields)
    _check_supported(fields)
    heads = fields.number("num_attention_heads", int)
    config = ModelConfig(
        vocab_size=fields.number("vocab_size", int),
        hidden_size=fields.number("hidden_size", int),
        intermediate_size=fields.number("intermediate_size", int),
        num_hidden_layers=fields.number("num_hidden_layers", int),
        num_attention_heads=heads,
        # null means as many as heads, to transformers too
        num_key_value_heads=fields.number(
            "num_key_value_heads", int, heads if fields.is_null("num_key_value_heads") else None
        ),
        head_dim=fields.number("head_dim", int) if fields.get("head_dim") is not None else None,
        max_position_embeddings=fields.number("max_position_embeddings", int, 32768),
        rms_norm_eps=fields.number("rms_norm_eps", float, 1e-6),
        rope_theta=_rope_theta(fields),
        tie_word_embeddings=fields.number("tie_word_embeddings", bool, False),
        initializer_range=fields.number("initializer_range", float, 0.02),
        moe=_moe(fields) if model_type == "qwen2_moe" else None,
    )
    try:
        config.check("model")
    except ConfigError as error:
        raise CheckpointError(f"{fields.path}: {str(error).replace('model.', '')}") from error
    return config


def read_carried_fields(folder: Path) -> dict[str, Any]:
    """Token ids, which the model ignores and a copy should keep: what `save_hf(config_extra=...)` takes."""
    fields = _Fields.read(folder / CONFIG_FILE)
    return {key: fields.get(key) for key in CARRIED if fields.get(key) is not None}


@dataclass(frozen=True)
class _Fields:
    """config.json with the path that its messages need."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> _Fields:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{path}: no such file; a Hugging Face checkpoint is a folder with config.json and .safetensors files"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: is not JSON ({error}); download or write it again") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: holds a {type(values).__name__}, not a JSON object")
        return cls(path, values)

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def is_null(self, key: str) -> bool:
        return key in self.values and self.values[key] is None

    def number(self, key: str, kind: type[T], default: T | None = None) -> T:
        """A field of this type; the default stands for an absent or null one, and without it that is an error."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.path}: {key}: is missing; it must be a {kind.__name__}")
            return default
        fits = isinstance(value, (int, float) if kind is float else kind) and (
            kind is bool or not isinstance(value, bool)
        )
        if not fits:
            raise CheckpointError(f"{self.path}: {key}: must be a {kind.__name__}, not {value!r}")
        return kind(value)

    def refuse(self, key: str, cure: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {key}: {json.dumps(self.get(key))} is not supported; {cure}")


def _model_type(fields: _Fields) -> str:
    model_type, architectures = fields.get("model_type"), fields.get("architectures")
    known = ", ".join(f"{architecture} (model_type '{kind}')" for kind, architecture in ARCHITECTURES.items())
    if model_type not in ARCHITECTURES:
        fields.refuse("model_type", f"moelab reads {known}")
    expected = ARCHITECTURES[model_type]
    if architectures is not None and architectures != [expected]:
        fields.refuse(
            "architectures", f"with model_type '{model_type}' it must be [\"{expected}\"]; moelab reads {known}"
        )
    return str(model_type)


def _check_supported(fields: _Fields) -> None:
    """Refuse what would change the result. `sliding_window` alone is harmless: published configs have it unused."""
    if fields.get("use_sliding_window", False) and fields.get("sliding_window"):
        fields.refuse("use_sliding_window", "moelab attends to all earlier positions; set it to false if that is right")
    layer_types = fields.get("layer_types") or []
    if any(kind != "full_attention" for kind in layer_types):
        fields.refuse("layer_types", 'every layer must be "full_attention"')
    if fields.get("hidden_act", "silu") != "silu":
        fields.refuse("hidden_act", 'it must be "silu"')
    if not fields.get("qkv_bias", True):
        fields.refuse("qkv_bias", "Qwen2 has biases on q, k and v; add zero biases to the weights and set it to true")
    if fields.get("attention_dropout", 0.0):
        fields.refuse("attention_dropout", "moelab has no dropout; set it to 0.0")
    if fields.get("quantization_config"):
        fields.refuse("quantization_config", "use the checkpoint in bfloat16 or float32 that it was made from")


def _rope_theta(fields: _Fields) -> float:
    for key in ("rope_scaling", "rope_parameters"):
        rope = fields.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            fields.refuse(key, "it must be an object or null")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if (
            kind != "default"
            or rope.get("partial_rotary_factor", 1.0) != 1.0
            or any(isinstance(v, dict) for v in rope.values())
        ):
            fields.refuse(key, 'only plain rotary embedding is: remove the key, or give {"rope_type": "default"}')
    nested = _Fields(fields.path, fields.get("rope_parameters") or {})
    top, inner = fields.get("rope_theta"), nested.get("rope_theta")
    if top is not None and inner is not None and top != inner:
        raise CheckpointError(
            f"{fields.path}: rope_theta {top} and rope_parameters.rope_theta {inner} contradict each other; "
            "transformers 4.x takes the first and 5.x the second: remove the wrong one"
        )
    return (fields if inner is None else nested).number("rope_theta", float, HF_ROPE_THETA)


def _moe(fields: _Fields) -> MoEConfig | None:
    num_experts = fields.number("num_experts", int)
    if num_experts == 0:  # transformers: every layer dense
        return None
    step = fields.number("decoder_sparse_step", int, 1)
    if step < 1:
        fields.refuse("decoder_sparse_step", "it must be at least 1")
    dense = fields.get("mlp_only_layers") or []
    if not (isinstance(dense, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in dense)):
        fields.refuse("mlp_only_layers", "it must be a list of layer numbers")
    return MoEConfig(
        layout={
            "name": "uniform",
            "num_experts": num_experts,
            "num_experts_per_tok": fields.number("num_experts_per_tok", int),
            "moe_intermediate_size": fields.number("moe_intermediate_size", int),
            "decoder_sparse_step": step,
            "mlp_only_layers": list(dense),
        },
        router={"name": "softmax_topk", "norm_topk_prob": fields.number("norm_topk_prob", bool, False)},
        shared_expert={
            "name": "gated",
            "intermediate_size": fields.number("shared_expert_intermediate_size", int),
        },
        # A loss is a choice of the training run, not of the weights: router_aux_loss_coef is left to its config.
        balance_losses=[],
    )
