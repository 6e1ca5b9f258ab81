"""Hidden states of a dense source for a few prompts, in float64 and without torch, a layer's matrices in pieces.

What a router made from them holds is part of the bytes that are verified later, perhaps on another machine: in float64
the order of a sum is far below the float32 that is kept. T tokens of all prompts, one after the other; D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab.config.model import ModelConfig
from moelab.config.rope_scaling import RopeContext
from moelab.errors import ConfigError
from moelab.hf import roles as names
from moelab.hookspecs import ROPE_SCALINGS
from moelab.registry import Registry
from moelab_upcycling.dtypes import to_float32
from moelab_upcycling.source import DenseSource

Floats = npt.NDArray[np.float64]


class DenseStates:
    """The residual stream that enters each layer; asked for in order of layers, every layer is computed once."""

    def __init__(self, source: DenseSource) -> None:
        """Reads nothing until it is asked."""
        self.source, self.config = source, source.opened.config
        self._texts: list[tuple[int, ...]] = []
        self._layer, self._x = 0, np.empty((0, 0))

    def entering(self, layer_id: int, texts: Sequence[Sequence[int]]) -> list[Floats]:
        """Token ids of each text -> [T_i, D] of each, as layer `layer_id` gets it: what mergekit and transformers call
        hidden_states[layer_id]. Raises ConfigError for ids that the source has no rows for, and for texts that are
        longer than all of it is seen at once.
        """
        asked = [tuple(text) for text in texts]
        if asked != self._texts or layer_id < self._layer:
            self._begin(asked)
        while self._layer < layer_id:
            self._x = self._through(self._layer, self._x)
            self._layer += 1
        return np.split(self._x, np.cumsum([len(text) for text in asked])[:-1])

    def _begin(self, texts: list[tuple[int, ...]]) -> None:
        rows = self.source.tensors[names.EMBEDDING].shape[0]
        if not texts or not all(texts) or min(map(min, texts)) < 0 or max(map(max, texts)) >= rows:
            raise ConfigError(f"token ids must be in 0 .. {rows - 1}, and at least one a text")
        longest, most = max(map(len, texts)), self.config.max_position_embeddings
        if self.config.attention is not None:  # all of a text within the window is what full attention sees
            most = min(most, self.config.attention.get("window", 0))
        if longest > most:
            raise ConfigError(f"a prompt has {longest} tokens, and the source sees {most} of them at once: shorten it")
        self._texts, self._layer = texts, 0
        ids = np.concatenate([np.asarray(text) for text in texts])
        self._x = self._wide(names.EMBEDDING, self.source.gathered(names.EMBEDDING, ids))

    def _through(self, layer_id: int, x: Floats) -> Floats:
        """x [T, D] -> [T, D], one decoder layer of Qwen2 and its kin."""
        layer = names.layer(layer_id)
        x = x + self._attention(layer, self._norm(f"{layer}.input_layernorm.weight", x))
        h = self._norm(names.router_norm(layer_id), x)
        gate, up = (self._linear(names.dense_ffn(layer_id, matrix), h) for matrix in ("gate", "up"))
        return x + self._linear(names.dense_ffn(layer_id, "down"), up * gate * _sigmoid(gate))

    def _attention(self, layer: str, x: Floats) -> Floats:
        config, prefix = self.config, f"{layer}.self_attn"
        parts = []
        for part in "qkv":
            heads = self._linear(f"{prefix}.{part}_proj.weight", x)
            if config.qkv_bias:
                heads = heads + self._whole(f"{prefix}.{part}_proj.bias")
            parts.append(heads.reshape(len(x), -1, config.attention_head_dim))
        query, key, value = parts
        if config.use_qk_norm:
            query, key = (self._norm(f"{prefix}.{n}_norm.weight", v) for n, v in (("q", query), ("k", key)))
        groups = config.num_attention_heads // config.num_key_value_heads
        out, begin = np.empty_like(query), 0
        for text in self._texts:
            mine = slice(begin, begin + len(text))
            begin = mine.stop
            cos, sin = _angles(config, len(text))
            q, k = (_turned(v[mine], cos, sin) for v in (query, key))
            k, v = (np.repeat(part, groups, axis=1) for part in (k, value[mine]))
            scores = np.einsum("thd,shd->hts", q, k) / config.attention_head_dim**0.5
            scores += np.triu(np.full((len(text), len(text)), -np.inf), 1)
            share = np.exp(scores - scores.max(-1, keepdims=True))
            out[mine] = np.einsum("hts,shd->thd", share / share.sum(-1, keepdims=True), v)
        return self._linear(f"{prefix}.o_proj.weight", out.reshape(len(x), -1))

    def _linear(self, name: str, x: Floats) -> Floats:
        """x [T, in] times a matrix [out, in], a few MB of its rows at a time -> [T, out]."""
        return np.concatenate([x @ self._wide(name, piece).T for piece in self.source.pieces(name)], axis=1)

    def _norm(self, name: str, x: Floats) -> Floats:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        return x / scale * self._whole(name)

    def _whole(self, name: str) -> Floats:
        return self._wide(name, self.source.array(name))

    def _wide(self, name: str, values: npt.NDArray[Any]) -> Floats:
        return to_float32(values, self.source.tensors[name].dtype).astype(np.float64)


def _sigmoid(x: Floats) -> Floats:
    small = np.exp(-np.abs(x))  # at most 1
    return np.where(x >= 0, 1, small) / (1 + small)


def _angles(config: ModelConfig, length: int) -> tuple[Floats, Floats]:
    """cos, sin [length, 1, head_dim]."""
    size = config.attention_head_dim
    frequency, factor = 1.0 / config.rope_theta ** (np.arange(0, size, 2, dtype=np.float64) / size), 1.0
    if config.rope_scaling is not None:
        frequency, factor = _scaled(config, frequency, length)
    angles = np.tile(np.arange(length)[:, None] * frequency, 2)[:, None]
    return np.cos(angles) * factor, np.sin(angles) * factor


def _scaled(config: ModelConfig, frequency: Floats, length: int) -> tuple[Floats, float]:
    """By the scaling's own plugin, which imports torch when called: 0.3 GB more a worker, of such sources alone."""
    import torch  # noqa: PLC0415

    assert config.rope_scaling is not None
    context = RopeContext(config.attention_head_dim, config.rope_theta, config.max_position_embeddings)
    scaling = Registry(points=(ROPE_SCALINGS,)).build(ROPE_SCALINGS, config.rope_scaling, context, ROPE_SCALINGS.key)
    if scaling is None:
        return frequency, 1.0
    found, factor = scaling(torch.from_numpy(frequency).float(), length)
    return found.double().numpy(), factor


def _turned(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """x [T, H, head_dim], halves rotated as Qwen2 does."""
    first, second = np.split(x, 2, axis=-1)
    return x * cos + np.concatenate([-second, first], axis=-1) * sin
