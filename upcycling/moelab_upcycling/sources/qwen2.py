"""Qwen2 and Qwen2.5, whose layout is this decoder's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moelab import Component, component, hookimpl
from moelab.dense_sources import DenseArchitecture

_BIASES = "Qwen2 has biases on q, k and v; add zero biases to the weights and set it to true"


@dataclass
class Qwen2Options:
    """None."""


def build(options: Qwen2Options, fields: Mapping[str, Any]) -> DenseArchitecture:
    """Qwen2 and Qwen2.5 (2407.10671, 2412.15115): biases on q, k and v.

    Source: transformers 5.23, models/qwen2/configuration_qwen2.py and modeling_qwen2.py.
    """
    return DenseArchitecture(
        class_name="Qwen2ForCausalLM",
        only=dict.fromkeys(("qkv_bias", "attention_bias"), ((True,), _BIASES)),
        window_rule="late",
        gguf_rows="halves",
    )


@hookimpl
def moelab_dense_sources() -> list[Component[Mapping[str, Any], DenseArchitecture]]:
    return [component("qwen2", Qwen2Options, build)]
