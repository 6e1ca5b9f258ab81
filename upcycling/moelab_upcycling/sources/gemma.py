"""Gemma, which is refused: what this decoder can't compute of it is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moelab import Component, component, hookimpl
from moelab.dense_sources import DenseArchitecture

_FIRST = ("a GELU in the FFN, where SwiGLU has SiLU", "embeddings scaled by the root of the hidden size")
_SECOND = (*_FIRST, "norms behind attention and FFN too")


@dataclass
class GemmaOptions:
    """None."""


def build(options: GemmaOptions, fields: Mapping[str, Any]) -> DenseArchitecture:
    """Gemma (2403.08295): refused, since its FFN has GELU and its embeddings are scaled.

    Source: transformers 5.23, models/gemma/modeling_gemma.py.
    """
    return DenseArchitecture(class_name="GemmaForCausalLM", unexpressed=_FIRST)


def build_second(options: GemmaOptions, fields: Mapping[str, Any]) -> DenseArchitecture:
    """Gemma 2 (2408.00118): refused, for Gemma's reasons, more norms and capped logits.

    Source: transformers 5.23, models/gemma2/modeling_gemma2.py.
    """
    return DenseArchitecture(class_name="Gemma2ForCausalLM", unexpressed=(*_SECOND, "capped logits and attention"))


def build_third(options: GemmaOptions, fields: Mapping[str, Any]) -> DenseArchitecture:
    """Gemma 3 (2503.19786), its text models: refused, for Gemma's reasons, more norms and sliding windows.

    Source: transformers 5.23, models/gemma3/modeling_gemma3.py.
    """
    return DenseArchitecture(class_name="Gemma3ForCausalLM", unexpressed=(*_SECOND, "sliding windows in most layers"))


@hookimpl
def moelab_dense_sources() -> list[Component[Mapping[str, Any], DenseArchitecture]]:
    return [
        component("gemma", GemmaOptions, build),
        component("gemma2", GemmaOptions, build_second),
        component("gemma3_text", GemmaOptions, build_third),
    ]
