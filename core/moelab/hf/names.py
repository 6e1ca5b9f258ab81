"""Hugging Face's tensor names, and how they and ours turn into each other. No other file knows them.

V vocabulary, D hidden size, E experts, F expert width.
Transformers 4.x keeps each expert's three matrices apart, on disk and in memory; 5.x fuses them in memory but
still writes them apart. We write them apart, which every client reads, and read both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moelab.config.model import ModelConfig
from moelab.errors import ConfigError
from moelab.hookspecs import SHARED_EXPERTS
from moelab.layouts import build_layouts
from moelab.moe.per_layer import layer_parts
from moelab.registry import Registry

Shape = tuple[int, ...]

LM_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_EXPERTS = re.compile(r"(layers\.\d+\.mlp\.experts)\.(gate_up|down)")
_BIASED_EXPERTS = re.compile(r"(layers\.\d+\.mlp\.experts)\.(gate_up|down)(_bias)?")
_RENAMED = {
    ".mlp.router.weight": ".mlp.gate.weight",
    ".mlp.shared_expert.gate.weight": ".mlp.shared_expert_gate.weight",
}


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor, and where its values lie in one of our parameters."""

    name: str  # Hugging Face's
    index: tuple[int | slice, ...] = ()  # of our parameter; () is all of it
    transposed: bool = False  # the two last axes
    turn: int | None = None  # of two that lie in turns along the tensor's last axis: which one

    def called(self, name: str) -> Piece:
        """The same place under another name."""
        return replace(self, name=name)

    def view(self, parameter: Any) -> Any:
        """The part of our parameter that this tensor is: a view in its shape, of a torch tensor or numpy array."""
        part = parameter[self.index] if self.index else parameter
        return part.mT if self.transposed else part

    def shape(self, ours: Shape) -> Shape:
        """The tensor's shape, when our parameter has the shape `ours`."""
        kept: list[int] = []
        for axis, size in enumerate(ours):
            at = self.index[axis] if axis < len(self.index) else slice(None)
            if isinstance(at, slice):
                kept.append(len(range(*at.indices(size))))
        if self.transposed:
            kept[-2:] = kept[-1], kept[-2]
        return tuple(kept) if self.turn is None else (*kept[:-1], 2 * kept[-1])


@dataclass(frozen=True)
class SparseShape:
    """The sizes of one MoE layer that decide its tensors."""

    num_experts: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int  # 0: there is none


def pieces(name: str, shape: Shape, *, fused: bool = False) -> list[Piece]:
    """The Hugging Face tensors that our parameter `name` of this shape is made of; together they cover it once.

    Only the expert banks have more than one: gate_up [E, 2F, D] and down [E, F, D], one or two for each expert.
    `fused` is the 3-D layout that transformers 5 holds in memory: gate_up_proj [E, 2F, D], down_proj [E, D, F].
    """
    found = _EXPERTS.fullmatch(name)
    if found is None:
        return [Piece(_plain(name))]
    prefix, is_down = f"model.{found[1]}", found[2] == "down"
    if fused:
        return [Piece(f"{prefix}.{found[2]}_proj", transposed=is_down)]
    if is_down:
        return [Piece(f"{prefix}.{e}.down_proj.weight", (e,), transposed=True) for e in range(shape[0])]
    width = shape[1] // 2
    halves = {"gate_proj": slice(0, width), "up_proj": slice(width, 2 * width)}
    return [Piece(f"{prefix}.{e}.{key}.weight", (e, rows)) for e in range(shape[0]) for key, rows in halves.items()]


def pieces_in_turns(name: str, shape: Shape) -> list[Piece]:
    """`pieces` in gpt-oss's layout: gate_up_proj [E, D, 2F], gate and up in turns, down_proj [E, F, D], and biases."""
    found = _BIASED_EXPERTS.fullmatch(name)
    if found is None:
        return [Piece(_plain(name))]
    theirs = f"model.{found[1]}.{found[2]}_proj{found[3] or ''}"
    if found[2] == "down":
        return [Piece(theirs)]
    everyone, width = slice(None), shape[1] // 2
    halves = slice(0, width), slice(width, 2 * width)
    return [Piece(theirs, (everyone, half), found[3] is None, turn) for turn, half in enumerate(halves)]


def parameter_shapes(config: ModelConfig, sparse: Mapping[int, SparseShape]) -> dict[str, Shape]:
    """Our parameters of a Qwen2 or Qwen2-MoE model, tied head left out: name -> shape."""
    hidden, head_dim = config.hidden_size, config.attention_head_dim
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    shapes: dict[str, Shape] = {"embed_tokens.weight": (config.vocab_size, hidden)}
    for layer_id in range(config.num_hidden_layers):
        prefix = f"layers.{layer_id}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        for projection, rows in {"q_proj": query, "k_proj": key, "v_proj": key}.items():
            shapes[f"{prefix}.self_attn.{projection}.weight"] = (rows, hidden)
            if config.qkv_bias:
                shapes[f"{prefix}.self_attn.{projection}.bias"] = (rows,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, query)
        if config.o_bias:
            shapes[f"{prefix}.self_attn.o_proj.bias"] = (hidden,)
        if config.attention_sinks:
            shapes[f"{prefix}.self_attn.sinks"] = (config.num_attention_heads,)
        if config.use_qk_norm:
            shapes |= {f"{prefix}.self_attn.{part}.weight": (head_dim,) for part in ("q_norm", "k_norm")}
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        layer = sparse.get(layer_id)
        if layer is None:
            shapes |= _swiglu(f"{prefix}.mlp", hidden, config.intermediate_size)
            continue
        experts, width = layer.num_experts, layer.moe_intermediate_size
        shapes[f"{prefix}.mlp.router.weight"] = (experts, hidden)
        shapes[f"{prefix}.mlp.experts.gate_up"] = (experts, 2 * width, hidden)
        shapes[f"{prefix}.mlp.experts.down"] = (experts, width, hidden)
        if layer.shared_expert_intermediate_size:
            shapes |= _swiglu(f"{prefix}.mlp.shared_expert", hidden, layer.shared_expert_intermediate_size)
            shapes[f"{prefix}.mlp.shared_expert.gate.weight"] = (1, hidden)
    shapes["norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def hf_shapes(parameters: Mapping[str, Shape]) -> dict[str, Shape]:
    """Our parameters' shapes -> those of the Hugging Face tensors, experts apart."""
    return {piece.name: piece.shape(shape) for name, shape in parameters.items() for piece in pieces(name, shape)}


def sparse_shapes(config: ModelConfig, registry: Registry | None = None) -> dict[int, SparseShape]:
    """{layer: sizes} of the sparse layers of a config that Qwen2-MoE can represent; no model is built.

    Raises ConfigError naming the layer whose shared expert Qwen2-MoE doesn't have.
    """
    if config.moe is None:
        return {}
    import torch  # noqa: PLC0415  (the names themselves serve upcycling, which does without torch)

    from moelab.builder import moe_context  # noqa: PLC0415

    registry = registry or Registry()
    parts = layer_parts(config.moe, config.num_hidden_layers)
    found = {}
    for layer_id, layout in build_layouts(config, registry).items():
        where = parts[layer_id].where("shared_expert")
        with torch.device("meta"):
            shared = registry.build(
                SHARED_EXPERTS, parts[layer_id].shared_expert, moe_context(config, layout, layer_id), where
            )
        fields = qwen2_moe_fields(shared)
        if isinstance(fields, str):
            raise ConfigError(f"{where}: Qwen2-MoE can't hold layer {layer_id}: {fields}")
        width = int(fields["shared_expert_intermediate_size"])
        found[layer_id] = SparseShape(layout.num_experts, layout.moe_intermediate_size, width)
    return found


def expected_tensors(config: ModelConfig, registry: Registry | None = None) -> dict[str, Shape]:
    """Every tensor of this config's checkpoint, in the model's order, experts apart: Hugging Face's name -> shape."""
    return hf_shapes(parameter_shapes(config, sparse_shapes(config, registry)))


def qwen2_moe_fields(part: object) -> dict[str, Any] | str:
    """What a router or shared expert says about itself for Qwen2-MoE's config.json, or why it can't."""
    if part is None:
        return "there is none, and Qwen2-MoE always has a gated one"
    from moelab.moe.gate import LinearRouter  # noqa: PLC0415  (torch, as above)

    if isinstance(part, LinearRouter) and (why := part.gate_differs()) is not None:
        return why
    describe = getattr(part, "qwen2_moe_fields", None)
    if not callable(describe):
        kind = type(part)
        return f"{kind.__module__}.{kind.__qualname__} has no counterpart there (it offers no qwen2_moe_fields)"
    answer: dict[str, Any] | str = describe()
    return answer


def _plain(name: str) -> str:
    for ours, theirs in _RENAMED.items():
        if name.endswith(ours):
            name = name.removesuffix(ours) + theirs
    return name if name == LM_HEAD else f"model.{name}"


def _swiglu(prefix: str, hidden: int, width: int) -> dict[str, Shape]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }
