"""Dual Chunk Attention: no query takes a key to be farther away than the model was trained to see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from moelab import Component, ConfigError, component, hookimpl
from moelab.nn.attention_inputs import AttentionContext, AttentionInputs, AttentionKernel
from moelab.nn.blocked_attention import View
from moelab.nn.masked_attention import masked_attention
from moelab.nn.rope import rotate

PRESETS, TEMPERATURES = ("paper", "qwen_1m"), ("none", "static", "per_query")


@dataclass
class DualChunkOptions:
    preset: str | None = "paper"  # paper or qwen_1m: what is not said below; null: chunk, local and max_position are
    original_max_position_embeddings: int | None = None  # the trained length c; null: the model's longest sequence
    chunk: int | None = None  # s, positions of a chunk; paper 3/4 c, qwen_1m c - local
    local: int | None = None  # w, within which positions are as they are; paper c - s, qwen_1m c / 32
    max_position: int | None = None  # of a query that looks further back; paper c - 1, qwen_1m c
    temperature: str = "none"  # none; static: scores times m^2, m of `factor`; per_query: m of i / temperature_from
    factor: float | None = None  # static: how many times the trained length
    temperature_from: int | None = None  # per_query: the length from which it grows; null: c

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, or null, not '{self.preset}'")
        if self.temperature not in TEMPERATURES:
            raise ValueError(f"temperature must be one of {', '.join(TEMPERATURES)}, not '{self.temperature}'")
        for key in ("original_max_position_embeddings", "chunk", "local", "max_position", "temperature_from"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, not {value}")
        if (self.temperature == "static") != (self.factor is not None):
            raise ValueError("factor goes with temperature static, and is needed there")
        if self.factor is not None and not 1 <= self.factor < inf:
            raise ValueError(f"factor must be at least 1, not {self.factor}")
        if self.preset is None and None in (self.chunk, self.local, self.max_position):
            raise ValueError("preset null needs chunk, local and max_position")


@dataclass(frozen=True)
class Chunks:
    """Where queries stand: s, w and the largest position, in the words of the paper."""

    chunk: int
    local: int
    max_position: int

    def __post_init__(self) -> None:
        s, w, most = self.chunk, self.local, self.max_position
        if w > s:
            raise ConfigError(f"local: {w} exceeds chunk {s}; positions are exact within one chunk at most")
        if not s <= most or s + w - 1 > most:
            raise ConfigError(
                f"max_position: {most} is less than chunk {s} + local {w} - 1, the position of a query that sees the "
                f"chunk before; make chunk or local smaller, or max_position {s + w - 1}"
            )

    @classmethod
    def of(cls, options: DualChunkOptions, trained: int) -> Chunks:
        """What the options say, and the preset of the rest. `trained`: the model's longest sequence."""
        c = options.original_max_position_embeddings or trained
        chunk, local, most = options.chunk, options.local, options.max_position
        if options.preset == "qwen_1m":
            local = local or max(1, (c - chunk) if chunk else c // 32)
            chunk, most = chunk or c - local, most or c
        elif options.preset == "paper":
            chunk = chunk or (c - local if local else max(1, 3 * c // 4))
            local, most = local or c - chunk, most or c - 1
        assert chunk is not None
        assert local is not None
        assert most is not None
        if chunk < 1 or local < 1:
            raise ConfigError(
                f"chunk {chunk}, local {local}: both must be at least 1; the trained length "
                f"(original_max_position_embeddings) is {c}"
            )
        return cls(chunk, local, most)


class DualChunkAttention:
    """Positions start again in each chunk; a query has one for its chunk, one for the last, one for all before.

    Formula: with r = i mod s, n = floor(i / s) - floor(j / s), keys at j mod s, queries at r (n = 0), s + r or
    `max_position` from r = w on (n = 1), `max_position` (n >= 2); one softmax over all keys.
    Source: Dual Chunk Attention (2402.17463) 3, eq. 2 to 7 (read as others quote them), one softmax as its code has it
    (HKUNLP/ChunkLlama, chunkllama_attn_replace.py); preset qwen_1m as vLLM's dual_chunk_flash_attn.py has it, for
    Qwen2.5-1M (2501.15383, not opened): chunk_size = s + w is the largest position. The official code differs from the
    paper in these sizes, and detaches the weights that merge the parts, so that its gradients are not those of its
    outputs; these are. Temperature: m = 0.1 ln(length / c) + 1 on queries and keys, so scores times m^2 as in YaRN
    (2309.00071) 3.4; vLLM's code multiplies the keys alone, and by the length of the whole text: here of what the
    query sees, so that the text before it doesn't change with what follows.
    Use: texts beyond the trained length without training, up to any length. With rope scaling yarn both apply.
    Cost: S^2 / 2 scores a head as full attention; queries are turned three times. On a CPU torch's kernel computes the
    parts (`nn.fused_parts`); backward passes, and texts with padding or documents or short ones, go in blocks.
    """

    reach = inf
    serves_sinks = True

    def __init__(self, options: DualChunkOptions, context: AttentionContext) -> None:
        self.chunks = Chunks.of(options, context.max_position_embeddings)
        self.layer_id = context.layer_id
        self.cache_mode = f"keys turned by their positions in chunks of {self.chunks.chunk}"
        self.factor = options.factor  # of a temperature that is the same for all queries
        self.grows_from = None
        if options.temperature == "per_query":
            trained = options.original_max_position_embeddings or context.max_position_embeddings
            self.grows_from = options.temperature_from or trained

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        if inputs.given_mask is not None or inputs.attend is not None:
            raise ConfigError("model.attention: dual_chunk takes masks of padding alone, and shows no weights")
        sizes = (self.chunks, self.factor, self.grows_from)
        turns, own = inputs.once(("dual_chunk", sizes), lambda: self._rotations(inputs))
        key = rotate(key, *(table.to(key.dtype) for table in own))
        if inputs.cache is not None:
            key, value = inputs.cache.append(self.layer_id, key, value)
        queries = [rotate(query, *(table.to(query.dtype) for table in turn)) for turn in turns]
        view = inputs.once(("dual_chunk view", self.chunks), lambda: View.of(inputs, chunk=self.chunks.chunk))
        return masked_attention(queries, key, value, view, inputs.look_of(self.layer_id), inputs.sinks)

    def _rotations(self, inputs: AttentionInputs) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
        """cos and sin of the queries, for each distance of chunks that occurs, and of the keys: [B or 1, 1, S, d]."""
        s, w, most = self.chunks.chunk, self.chunks.local, self.chunks.max_position
        position = inputs.key_positions[:, inputs.past :]
        inside = position % s
        before = torch.where(inside < w, s + inside, most)
        places = [inside, before, torch.full_like(inside, most)][: (inputs.length - 1) // s + 1]
        sharper = self._sharper(position)
        turns = [inputs.rotation(place) for place in places]
        if sharper is not None:
            turns = [(cos * sharper, sin * sharper) for cos, sin in turns]
        return turns, inputs.rotation(inside)

    def _sharper(self, position: Tensor) -> Tensor | float | None:
        """m^2 of each query, [B or 1, 1, S, 1] or one for all; None: 1."""
        if self.grows_from is not None:
            beyond = ((position + 1).float() / self.grows_from).clamp(min=1.0)
            return (0.1 * beyond.log() + 1.0).square()[:, None, :, None]
        return None if self.factor is None else (0.1 * math.log(self.factor) + 1.0) ** 2


@hookimpl
def moelab_attentions() -> list[Component[AttentionContext, AttentionKernel]]:
    return [component("dual_chunk", DualChunkOptions, DualChunkAttention)]
