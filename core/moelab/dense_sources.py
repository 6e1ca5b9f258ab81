"""The contract of a dense source: how config.json and tensors of one kind of model say what this decoder computes.

A model in Hugging Face's layout is read under the names of its kin Qwen2 (hf/names.py, hf/roles.py): loading, upcycling
and verifying know those alone. What this decoder would compute differently is refused. Free of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moelab.config.model import ModelConfig


@dataclass(frozen=True)
class Part:
    """A tensor under Qwen2's name: all of a stored one, or some of its rows where several were fused into one."""

    name: str
    first: int = 0
    rows: int | None = None  # None: all of them


def as_named(name: str, config: ModelConfig) -> list[Part]:
    """Tensors that are called as Qwen2's."""
    return [Part(name)]


@dataclass(frozen=True)
class DenseArchitecture:
    """One kind of dense model. Its component's name is the `model_type` of config.json.

    GGUF calls the kinds `general.architecture`, mostly by the same names. A third party's package offers another one
    with the hook `moelab_dense_sources`: `build(options, fields)` is given the fields of config.json.
    """

    class_name: str  # of transformers, which config.json's `architectures` may name
    model: Mapping[str, Any] = field(default_factory=dict)  # what all of the kind have: {"qkv_bias": False}
    defaults: Mapping[str, Any] = field(default_factory=dict)  # transformers', of fields that config.json leaves out
    # {field: (the values under which this decoder computes the same, what else to do)}
    only: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()  # fields that change nothing
    # How the kind says which layers see a window alone, as hf/positions.py: WINDOW_RULES names it; None: it has none.
    window_rule: str | None = None
    default_window: int | None = 4096  # transformers', where `sliding_window` is left out
    unexpressed: tuple[str, ...] = ()  # what this decoder can't compute: such a model is refused, naming them
    # A stored tensor's name -> what it holds; [] for one that is no weight.
    parts: Callable[[str, ModelConfig], list[Part]] = as_named
    # How GGUF orders the rows of q and k within a head: "halves" as here, "pairs" as llama.cpp's converter does for
    # kinds whose rotary embedding it computes on neighbours. None: not read from GGUF.
    gguf_rows: str | None = None


NO_OUTPUT_BIAS = "its biases are on o_proj too, which no target of upcycling has; set it to false where there are none"
# Of all kinds whose attention has no biases.
WITHOUT_BIASES: Mapping[str, tuple[tuple[Any, ...], str]] = {"attention_bias": ((False,), NO_OUTPUT_BIAS)}
