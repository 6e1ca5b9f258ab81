"""A dense source: Llama's kin that calls its FFN's matrices w1, w2 and w3. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moelab import Component, component, hookimpl
from moelab.config.model import ModelConfig
from moelab.dense_sources import WITHOUT_BIASES, DenseArchitecture, Part

NAMES = {".ffn.w1.": ".mlp.gate_proj.", ".ffn.w2.": ".mlp.down_proj.", ".ffn.w3.": ".mlp.up_proj."}


@dataclass
class Options:
    """None."""


def parts(name: str, config: ModelConfig) -> list[Part]:
    """What a stored tensor holds, under the names that Qwen2 has for it."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return [Part(name)]


def my_dense_source(options: Options, fields: Mapping[str, Any]) -> DenseArchitecture:
    """Read wherever config.json's model_type is my_dense_source; a kind with biases would be refused by name."""
    return DenseArchitecture(
        class_name="MyDenseSourceForCausalLM", model={"qkv_bias": False}, only=WITHOUT_BIASES, parts=parts
    )


@hookimpl
def moelab_dense_sources() -> list[Component]:
    return [component("my_dense_source", Options, my_dense_source)]
