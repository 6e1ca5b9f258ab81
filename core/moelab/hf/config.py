"""Hugging Face's config.json of a dense model, or of one with experts -> ModelConfig.

Dense kinds are plugins (dense_sources.py); kinds with experts stand in hf/moe_formats.py. Read as transformers 4.x
writes config.json (`rope_theta`, `torch_dtype`) and as 5.x does (`rope_parameters`, `dtype`).
What this decoder would compute differently is refused, never ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.config.model import ModelConfig
from moelab.dense_sources import DenseArchitecture
from moelab.errors import CheckpointError, ConfigError
from moelab.hf.fields import HARMLESS, ONLY, READ, Fields
from moelab.hf.files import A_CHECKPOINT, not_there, read_json
from moelab.hf.gguf_file import GGUFFile, gguf_of
from moelab.hf.moe_formats import MOE_FORMATS, MoEFormat
from moelab.hf.positions import read_attention, read_rope_scaling, ropes
from moelab.hf.scaled_blocks import Block, block_of
from moelab.hf.unexpressed import UNEXPRESSED
from moelab.hookspecs import DENSE_SOURCES
from moelab.registry import Registry

ADAPTED = "moelab"  # model_type of what `save_pretrained` of the adapter writes
CONFIG_FILE, QUANTISED = "config.json", "quantization_config"
HF_ROPE_THETA = 10_000.0  # transformers' default where config.json names none; Qwen2's own is 1e6

logger = logging.getLogger("moelab")


@dataclass(frozen=True)
class Described:
    """What a folder says of its model."""

    config: ModelConfig
    kind: DenseArchitecture | MoEFormat
    model_type: str
    block: Block | None = None  # of weights that are stored in eight bits


def read_config(folder: Path, registry: Registry | None = None) -> ModelConfig:
    """The model that `folder/config.json` describes, or the metadata of a GGUF file.

    `registry`: the plugins that may know its kind; None: the installed ones. Raises CheckpointError naming file, key,
    found value and what would do.
    """
    return describe(folder, registry).config


def describe(folder: Path, registry: Registry | None = None) -> Described:
    """`read_config`, and the kind of model that it is."""
    return described_by(read_fields(folder), registry)


def described_by(fields: Fields, registry: Registry | None = None) -> Described:
    """`describe` of fields in the words of config.json."""
    model_type, kind = _kind(fields, registry)
    _check_supported(fields, kind)
    heads = fields.number("num_attention_heads", int)
    said = kind.defaults
    config = ModelConfig(
        vocab_size=fields.number("vocab_size", int),
        hidden_size=fields.number("hidden_size", int),
        intermediate_size=fields.number("intermediate_size", int),
        num_hidden_layers=fields.number("num_hidden_layers", int),
        num_attention_heads=heads,
        # null means as many as heads, to transformers too
        num_key_value_heads=fields.number(
            "num_key_value_heads",
            int,
            heads if fields.is_null("num_key_value_heads") else said.get("num_key_value_heads"),
        ),
        head_dim=_head_dim(fields, said),
        max_position_embeddings=fields.number(
            "max_position_embeddings", int, said.get("max_position_embeddings", 32768)
        ),
        rms_norm_eps=fields.number("rms_norm_eps", float, said.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(fields, said.get("rope_theta", HF_ROPE_THETA)),
        rope_scaling=read_rope_scaling(fields, registry),
        attention=read_attention(fields, kind.window_rule, kind.default_window),
        tie_word_embeddings=fields.number("tie_word_embeddings", bool, False),
        initializer_range=fields.number("initializer_range", float, 0.02),
        **kind.model,
    )
    if isinstance(kind, MoEFormat):
        kind.complete(config, fields)
    try:
        config.check("model")
    except ConfigError as error:
        raise CheckpointError(f"{fields.path}: {str(error).replace('model.', '')}") from error
    return Described(config, kind, model_type, _block(fields, kind))


def read_fields(folder: Path) -> Fields:
    """config.json of a folder, or what a GGUF file says in its words."""
    gguf = gguf_of(folder)
    if gguf is not None:
        return Fields(gguf, GGUFFile.of(gguf).fields())
    if not folder.is_dir():
        raise CheckpointError(not_there(folder))
    return Fields(folder / CONFIG_FILE, read_json(folder / CONFIG_FILE, f"a Hugging Face checkpoint is {A_CHECKPOINT}"))


def _kind(fields: Fields, registry: Registry | None) -> tuple[str, DenseArchitecture | MoEFormat]:
    """(model_type, what it means)."""
    model_type, architectures = fields.get("model_type"), fields.get("architectures")
    registry = registry or Registry(points=(DENSE_SOURCES,))
    dense = registry.components(DENSE_SOURCES)
    if isinstance(model_type, str) and model_type in UNEXPRESSED and model_type not in dense:
        fields.refuse("model_type", f"moelab's decoder can't compute {'; nor '.join(UNEXPRESSED[model_type])}")
    if not isinstance(model_type, str) or model_type not in dense.keys() | MOE_FORMATS.keys():
        known = ", ".join([*dense, *MOE_FORMATS])
        if model_type == ADAPTED:  # of any router, so no format of ours but transformers' own reads it
            fields.refuse(
                "model_type",
                "save_pretrained of an adapted model wrote it: moelab.register_with_transformers(), then "
                "transformers.AutoModelForCausalLM.from_pretrained(FOLDER), whose `.model` is moelab's",
            )
        fields.refuse("model_type", f"moelab reads {known}; a plugin may add a kind (hook moelab_dense_sources)")
    kind: DenseArchitecture | MoEFormat
    if model_type in MOE_FORMATS:
        kind = MOE_FORMATS[model_type]
    else:
        kind = registry.build(DENSE_SOURCES, {"name": model_type}, fields.values, "source")
        if kind.unexpressed:
            fields.refuse("model_type", f"moelab's decoder can't compute {'; nor '.join(kind.unexpressed)}")
    if architectures is not None and architectures != [kind.class_name]:
        fields.refuse("architectures", f"with model_type '{model_type}' it must be [\"{kind.class_name}\"]")
    return model_type, kind


def _check_supported(fields: Fields, kind: DenseArchitecture | MoEFormat) -> None:
    """Refuse what would change the result, and what two readers would understand differently."""
    checked = kind.checked if isinstance(kind, MoEFormat) else frozenset()
    only = {key: value for key, value in {**ONLY, **kind.only}.items() if key not in checked}
    for key, (accepted, cure) in only.items():
        if key == QUANTISED and _block(fields, kind) is not None:
            continue
        if fields.get(key) is not None and fields.get(key) not in accepted:
            fields.refuse(key, cure)
    if fields.get("torch_dtype", fields.get("dtype")) != fields.get("dtype", fields.get("torch_dtype")):
        raise CheckpointError(
            f"{fields.path}: torch_dtype {fields.get('torch_dtype')} and dtype {fields.get('dtype')} contradict each "
            "other; transformers 4.x takes the first and 5.x the second: remove the wrong one"
        )
    unknown = sorted(fields.values.keys() - READ - only.keys() - HARMLESS - kind.unused - checked)
    if unknown:
        logger.warning(
            "%s: %s: not known to moelab, nor to transformers' model of this kind; left out. If a field changes what "
            "the model computes, this is not that model",
            fields.path,
            ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""),
        )


def _block(fields: Fields, kind: DenseArchitecture | MoEFormat) -> Block | None:
    """Upcycling, which reads dense kinds, reads no eight bits."""
    return block_of(fields.get(QUANTISED)) if isinstance(kind, MoEFormat) else None


def _head_dim(fields: Fields, said: Mapping[str, Any]) -> int | None:
    default = None if fields.is_null("head_dim") else said.get("head_dim")
    return default if fields.get("head_dim") is None else fields.number("head_dim", int)


def _rope_theta(fields: Fields, default: float) -> float:
    """The one theta that all places agree on: the top, `rope_scaling` and `rope_parameters`."""
    found = {"rope_theta": fields.get("rope_theta")}
    found |= {f"{key}.rope_theta": rope.get("rope_theta") for key, rope in ropes(fields).items()}
    said = {place: theta for place, theta in found.items() if theta is not None}
    if any(theta != next(iter(said.values())) for theta in said.values()):
        listed = " and ".join(f"{place} {theta}" for place, theta in said.items())
        raise CheckpointError(
            f"{fields.path}: {listed} contradict each other; transformers 4.x takes the first and 5.x the last: "
            "remove the wrong one"
        )
    theta = next(iter(said.values()), None)
    return Fields(fields.path, {"rope_theta": theta}).number("rope_theta", float, default)
