"""Hugging Face's config.json of Qwen2ForCausalLM and Qwen2MoeForCausalLM -> ModelConfig.

Read as transformers 4.x writes it (`rope_theta`, `torch_dtype`) and as 5.x does (`rope_parameters`, `dtype`).
What this decoder would compute differently is refused, never ignored.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from moelab.config.model import ModelConfig, MoEConfig
from moelab.errors import CheckpointError, ConfigError
from moelab.hf.fields import HARMLESS, ONLY, READ
from moelab.hf.files import read_json

CONFIG_FILE = "config.json"
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}
HF_ROPE_THETA = 10_000.0  # transformers' default where config.json names none; Qwen2's own is 1e6

logger = logging.getLogger("moelab")

T = TypeVar("T", int, float, bool)


def read_config(folder: Path) -> ModelConfig:
    """The model that `folder/config.json` describes.

    Raises CheckpointError naming file, key, found value and what would do.
    """
    fields = _Fields.read(folder / CONFIG_FILE)
    model_type = _model_type(fields)
    _check_supported(fields, model_type)
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


@dataclass(frozen=True)
class _Fields:
    """config.json with the path that its messages need."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> _Fields:
        missing = "a Hugging Face checkpoint is a folder with config.json and .safetensors files"
        return cls(path, read_json(path, missing))

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
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        fields.refuse("model_type", f"moelab reads {known}")
    expected = ARCHITECTURES[model_type]
    if architectures is not None and architectures != [expected]:
        fields.refuse(
            "architectures", f"with model_type '{model_type}' it must be [\"{expected}\"]; moelab reads {known}"
        )
    return model_type


def _check_supported(fields: _Fields, model_type: str) -> None:
    """Refuse what would change the result, and what two readers would understand differently."""
    for key, (accepted, cure) in ONLY.items():
        if fields.get(key) is not None and fields.get(key) not in accepted:
            fields.refuse(key, cure)
    _check_window(fields, model_type)
    if fields.get("torch_dtype", fields.get("dtype")) != fields.get("dtype", fields.get("torch_dtype")):
        raise CheckpointError(
            f"{fields.path}: torch_dtype {fields.get('torch_dtype')} and dtype {fields.get('dtype')} contradict each "
            "other; transformers 4.x takes the first and 5.x the second: remove the wrong one"
        )
    unknown = sorted(fields.values.keys() - READ - ONLY.keys() - HARMLESS)
    if unknown:
        logger.warning(
            "%s: %s: not known to moelab, nor to transformers' Qwen2; left out. If a field changes what the model "
            "computes, this is not that model",
            fields.path,
            ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""),
        )


def _check_window(fields: _Fields, model_type: str) -> None:
    """`sliding_window` alone is harmless: published configs have it unused. In use it is not there, and refused.

    transformers 5.23: of a dense Qwen2 the layers from max_window_layers on attend within the window, of a
    Qwen2-MoE every other one below it (configuration_qwen2.py, configuration_qwen2_moe.py).
    """
    if fields.get("use_sliding_window", False):
        layers, first = fields.number("num_hidden_layers", int), fields.number("max_window_layers", int, 28)
        if model_type != "qwen2" or first < layers:
            fields.refuse(
                "use_sliding_window", "moelab attends to all earlier positions; set it to false if that is right"
            )
    layer_types = fields.get("layer_types")
    if layer_types is not None and not (
        isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)
    ):
        fields.refuse("layer_types", 'it must be a list, and every layer "full_attention"')


def _rope_theta(fields: _Fields) -> float:
    """The one theta that all places agree on: the top, `rope_scaling` and `rope_parameters`."""
    found = {"rope_theta": fields.get("rope_theta")}
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
        found[f"{key}.rope_theta"] = rope.get("rope_theta")
    said = {place: theta for place, theta in found.items() if theta is not None}
    if any(theta != next(iter(said.values())) for theta in said.values()):
        listed = " and ".join(f"{place} {theta}" for place, theta in said.items())
        raise CheckpointError(
            f"{fields.path}: {listed} contradict each other; transformers 4.x takes the first and 5.x the last: "
            "remove the wrong one"
        )
    theta = next(iter(said.values()), None)
    return _Fields(fields.path, {"rope_theta": theta}).number("rope_theta", float, HF_ROPE_THETA)


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
