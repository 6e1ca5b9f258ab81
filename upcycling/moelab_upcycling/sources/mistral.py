"""Mistral: Llama's layout, a head size of its own, and in the first release a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moelab import Component, component, hookimpl
from moelab.dense_sources import WITHOUT_BIASES, DenseArchitecture


@dataclass
class MistralOptions:
    """None."""


def build(options: MistralOptions, fields: Mapping[str, Any]) -> DenseArchitecture:
    """Mistral (2310.06825), dense: no biases, and in the first release a sliding window in every layer.

    Source: transformers 5.23, models/mistral/configuration_mistral.py: a window of 4096 where the field is left out.
    """
    return DenseArchitecture(
        class_name="MistralForCausalLM",
        model={"qkv_bias": False},
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8},
        only=WITHOUT_BIASES,
        window_rule="plain",
    )


@hookimpl
def moelab_dense_sources() -> list[Component[Mapping[str, Any], DenseArchitecture]]:
    return [component("mistral", MistralOptions, build)]
