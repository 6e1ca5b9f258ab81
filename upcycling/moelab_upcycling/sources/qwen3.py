"""Qwen3: each head's query and key normed, no biases, and a head size apart from hidden size and heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moelab import Component, component, hookimpl
from moelab.dense_sources import WITHOUT_BIASES, DenseArchitecture


@dataclass
class Qwen3Options:
    """None."""


def build(options: Qwen3Options, fields: Mapping[str, Any]) -> DenseArchitecture:
    """Qwen3 (2505.09388), dense: RMSNorm over each head of q and k, in place of Qwen2's biases.

    Source: transformers 5.23, models/qwen3/configuration_qwen3.py (head_dim 128 unless said) and modeling_qwen3.py.
    """
    return DenseArchitecture(
        class_name="Qwen3ForCausalLM",
        model={"qkv_bias": False, "use_qk_norm": True},
        defaults={"head_dim": 128},
        only=WITHOUT_BIASES,
        window_rule="late",
        gguf_rows="halves",
    )


@hookimpl
def moelab_dense_sources() -> list[Component[Mapping[str, Any], DenseArchitecture]]:
    return [component("qwen3", Qwen3Options, build)]
