"""Llama 2, 3, 3.1 to 3.3 and what is built like them: TinyLlama, SmolLM2, ..."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moelab import Component, component, hookimpl
from moelab.config.model import ModelConfig
from moelab.dense_sources import WITHOUT_BIASES, DenseArchitecture, Part

_TABLE = ".rotary_emb.inv_freq"  # transformers before 4.32 stored this buffer, which follows from the config


@dataclass
class LlamaOptions:
    """None."""


def parts(name: str, config: ModelConfig) -> list[Part]:
    """As Qwen2's, but for a stored table of the rotary embedding."""
    return [] if name.endswith(_TABLE) else [Part(name)]


def build(options: LlamaOptions, fields: Mapping[str, Any]) -> DenseArchitecture:
    """Llama (2302.13971, 2307.09288, 2407.21783): Qwen2 without biases; from 3.1 on with stretched wavelengths.

    Source: transformers 5.23, models/llama/configuration_llama.py and modeling_llama.py; llama.cpp's
    convert_hf_to_gguf.py (LlamaModel.permute) for the order of rows in GGUF.
    """
    return DenseArchitecture(
        class_name="LlamaForCausalLM",
        model={"qkv_bias": False},
        defaults={"max_position_embeddings": 2048, "num_key_value_heads": fields.get("num_attention_heads")},
        only=WITHOUT_BIASES,
        unused=frozenset({"pretraining_tp", "is_llama_config", "rope_interleaved", "transformers.js_config"}),
        parts=parts,
        gguf_rows="pairs",
    )


@hookimpl
def moelab_dense_sources() -> list[Component[Mapping[str, Any], DenseArchitecture]]:
    return [component("llama", LlamaOptions, build)]
