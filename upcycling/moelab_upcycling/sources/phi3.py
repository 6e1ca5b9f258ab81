"""Phi-3: Llama's layout with q, k and v in one matrix, and gate and up in another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moelab import Component, component, hookimpl
from moelab.config.model import ModelConfig
from moelab.dense_sources import WITHOUT_BIASES, DenseArchitecture, Part

_DROPOUT = "moelab has no dropout; set it to 0.0"


@dataclass
class Phi3Options:
    """None."""


def parts(name: str, config: ModelConfig) -> list[Part]:
    """The rows of q, then k, then v; of gate, then up (modeling_phi3.py: Phi3Attention, Phi3MLP)."""
    query, key = (h * config.attention_head_dim for h in (config.num_attention_heads, config.num_key_value_heads))
    width = config.intermediate_size
    if name.endswith(".qkv_proj.weight"):
        rows = {"q_proj": (0, query), "k_proj": (query, key), "v_proj": (query + key, key)}
        return [Part(name.replace("qkv_proj", part), *place) for part, place in rows.items()]
    if name.endswith(".gate_up_proj.weight"):
        rows = {"gate_proj": (0, width), "up_proj": (width, width)}
        return [Part(name.replace("gate_up_proj", part), *place) for part, place in rows.items()]
    return [Part(name)]


def build(options: Phi3Options, fields: Mapping[str, Any]) -> DenseArchitecture:
    """Phi-3 (2404.14219), dense, with plain rotary embedding over whole heads: the 4k models. Fused matrices are cut.

    Source: transformers 5.23, models/phi3/configuration_phi3.py and modeling_phi3.py.
    """
    return DenseArchitecture(
        class_name="Phi3ForCausalLM",
        model={"qkv_bias": False},
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": fields.get("num_attention_heads"),
        },
        only={**WITHOUT_BIASES, "resid_pdrop": ((0, 0.0), _DROPOUT), "embd_pdrop": ((0, 0.0), _DROPOUT)},
        unused=frozenset({"original_max_position_embeddings"}),
        window_rule="plain",
        default_window=None,
        parts=parts,
        gguf_rows="halves",
    )


@hookimpl
def moelab_dense_sources() -> list[Component[Mapping[str, Any], DenseArchitecture]]:
    return [component("phi3", Phi3Options, build)]
