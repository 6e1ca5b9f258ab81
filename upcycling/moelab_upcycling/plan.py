"""The plan: every tensor of the output, what it is made from, and where it will lie, before any weight is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from moelab.config.model import ModelConfig
from moelab.config.upcycle import RecipeConfig, UpcycleConfig
from moelab.errors import CheckpointError
from moelab.hf import roles as names
from moelab.hf.moe_formats import MOE_FORMATS
from moelab.hf.names import hf_shapes, parameter_shapes
from moelab.initialisers import MATRICES
from moelab_upcycling.dtypes import SAFETENSORS_NAMES, STORAGE, TORCH_NAMES
from moelab_upcycling.source import DenseSource
from moelab_upcycling.target import Target

FORMAT = 1  # of the bytes: raised whenever the same recipe and seed would give others


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output. `role`: copy, zeros, expert, shared, router or shared_gate."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    source: str = ""  # copy: the source tensor, of which the first shape[0] rows are taken
    layer_id: int = -1
    expert: int = -1
    matrix: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize


@dataclass(frozen=True)
class Shard:
    """One output file, and one unit of work, of resuming and of verifying."""

    file: str
    tensors: tuple[OutputTensor, ...]
    layer_id: int = -1  # -1: no layer's

    @cached_property
    def header(self) -> bytes:
        """The file's first bytes, padded to 4096 so that the data is aligned for direct writing."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            span = [offset, offset + tensor.nbytes]
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % 4096)
        return len(text).to_bytes(8, "little") + text

    @property
    def offsets(self) -> list[int]:
        """Of each tensor, from the end of the header."""
        offsets, total = [], 0
        for tensor in self.tensors:
            offsets.append(total)
            total += tensor.nbytes
        return offsets

    @property
    def data_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.data_bytes


@dataclass(frozen=True)
class Plan:
    """All that the output's bytes depend on, beside the sources' weights. Plain data: it goes to the workers."""

    target: Target
    sources: tuple[str, ...]
    fingerprints: tuple[str, ...]
    recipe: RecipeConfig  # with every default written out
    seed: int
    dtype: str  # of what is made, as safetensors calls it
    max_shard_size: int
    shards: tuple[Shard, ...]
    plugins: tuple[str, ...]
    entry_points: bool
    search_path: tuple[str, ...] = ()
    arithmetic: tuple[str, ...] = ()  # how `scale` came to its sizes, for who reads along

    @property
    def tensors(self) -> list[OutputTensor]:
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @property
    def total_size(self) -> int:
        """Bytes of all tensors, as the index states it."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    def identity(self) -> dict[str, Any]:
        """What the bytes and their files depend on, as JSON: two plans of one identity make the same folder."""
        return {
            "format": FORMAT,
            "fingerprints": list(self.fingerprints),
            "config": dict(self.target.config),
            "recipe": asdict(self.recipe),
            "seed": self.seed,
            "dtype": self.dtype,
            "max_shard_size": self.max_shard_size,
            "plugins": list(self.plugins),
        }

    @cached_property
    def hash(self) -> str:
        return identity_hash(self.identity())

    def config_json(self) -> dict[str, Any]:
        return {**self.target.config, "torch_dtype": TORCH_NAMES[self.dtype]}


def identity_hash(identity: Mapping[str, Any]) -> str:
    """The name of a plan: two of one identity have it."""
    return sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()


def make_plan(
    config: UpcycleConfig, dense: ModelConfig, target: Target, recipe: RecipeConfig, sources: list[DenseSource]
) -> Plan:
    """`dense` is what the source's config.json says. CheckpointError where a source's tensors say otherwise."""
    for source in sources:
        _check(source, dense)
    dtype = _dtype(config, sources)
    shards = _shards(target, dtype, config, sources)
    return Plan(
        target=target,
        sources=tuple(str(Path(source.folder).resolve()) for source in sources),
        fingerprints=tuple(source.fingerprint() for source in sources),
        recipe=recipe,
        seed=config.seed,
        dtype=dtype,
        max_shard_size=config.shard_bytes,
        shards=shards,
        plugins=tuple(config.plugins),
        entry_points=config.entry_points,
    )


def _dtype(config: UpcycleConfig, sources: list[DenseSource]) -> str:
    if config.dtype is not None:
        return SAFETENSORS_NAMES[config.dtype]
    found = {t.dtype for source in sources for t in source.tensors.values() if len(t.shape) == 2}
    if len(found) != 1:
        raise CheckpointError(f"{sources[0].folder}: matrices of several types {sorted(found)}; choose with dtype=...")
    return found.pop()


def _shards(target: Target, dtype: str, config: UpcycleConfig, sources: list[DenseSource]) -> tuple[Shard, ...]:
    """A shard is a layer, or a part of one that is too large, so that no file needs two layers."""
    groups: list[tuple[int, list[OutputTensor]]] = []
    for layer_id in range(target.num_hidden_layers):
        groups += [(layer_id, part) for part in _split(_layer(target, layer_id, dtype, sources), config.shard_bytes)]
    groups += [(-1, part) for part in _split(_rest(target, dtype, sources), config.shard_bytes)]
    count = len(groups)
    return tuple(
        Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(tensors), layer_id)
        for i, (layer_id, tensors) in enumerate(groups, 1)
    )


def _split(tensors: list[OutputTensor], limit: int) -> list[list[OutputTensor]]:
    parts: list[list[OutputTensor]] = [[]]
    used = 0
    for tensor in tensors:
        if parts[-1] and used + tensor.nbytes > limit:
            parts.append([])
            used = 0
        parts[-1].append(tensor)
        used += tensor.nbytes
    return parts


def _layer(target: Target, layer_id: int, dtype: str, sources: list[DenseSource]) -> list[OutputTensor]:
    """In the order of making: all that needs one source matrix stands together, so one at a time is held."""
    hidden = target.hidden_size
    found = names.attention(layer_id, qkv_bias=target.qkv_bias, use_qk_norm=target.use_qk_norm)
    made = [
        _copy(sources, name, dtype) if name in sources[0].tensors else _zero_bias(sources, name, dtype)
        for name in found
    ]
    layout = target.layouts.get(layer_id)
    if layout is None:
        return made + [_copy(sources, names.dense_ffn(layer_id, matrix), dtype) for matrix in MATRICES]
    experts = layout.num_experts
    stored = MOE_FORMATS[target.model_type].stored_name
    made.append(OutputTensor(stored(names.router(layer_id)), dtype, (experts, hidden), "router", layer_id=layer_id))
    shared = 1 if target.shared_intermediate_size else 0
    if shared:
        made.append(OutputTensor(names.shared_gate(layer_id), dtype, (1, hidden), "shared_gate", layer_id=layer_id))
    for matrix in MATRICES:
        for role, count, size in (
            ("shared", shared, target.shared_intermediate_size),
            ("expert", experts, layout.moe_intermediate_size),
        ):
            shape = (hidden, size) if matrix == "down" else (size, hidden)
            for e in range(count):
                name = names.shared(layer_id, matrix) if role == "shared" else names.expert(layer_id, e, matrix)
                made.append(OutputTensor(stored(name), dtype, shape, role, layer_id=layer_id, expert=e, matrix=matrix))
    return made


def _rest(target: Target, dtype: str, sources: list[DenseSource]) -> list[OutputTensor]:
    embedding = _copy(sources, names.EMBEDDING, dtype, rows=target.vocab_size)
    made = [embedding, _copy(sources, names.NORM, dtype)]
    if target.tie_word_embeddings:
        return made
    head = names.LM_HEAD if names.LM_HEAD in sources[0].tensors else names.EMBEDDING  # untie: tied in the source
    made.append(_copy(sources, head, dtype, rows=target.vocab_size, name=names.LM_HEAD))
    return made


def _zero_bias(sources: list[DenseSource], name: str, dtype: str) -> OutputTensor:
    """A bias that the source hasn't got: the same function."""
    rows = sources[0].tensors[name.removesuffix("bias") + "weight"].shape[0]
    return OutputTensor(name, dtype, (rows,), "zeros")


def _copy(
    sources: list[DenseSource], source: str, dtype: str, *, rows: int | None = None, name: str = ""
) -> OutputTensor:
    shape = sources[0].tensors[source].shape
    shape = shape if rows is None else (rows, *shape[1:])
    return OutputTensor(name or source, dtype, shape, "copy", source=source)


def _check(source: DenseSource, dense: ModelConfig) -> None:
    """As every reader checks a folder; and every type is one that can be computed in."""
    tied = (names.LM_HEAD, names.EMBEDDING) if dense.tie_word_embeddings else None
    source.stored.check(hf_shapes(parameter_shapes(dense, {})), tied=tied)
    for tensor in source.tensors.values():
        if tensor.dtype not in STORAGE:
            raise CheckpointError(
                f"{tensor.path}: '{tensor.name}' is {tensor.dtype}; only {', '.join(STORAGE)} can be upcycled"
            )


def ledger(plan: Plan, sources: list[DenseSource]) -> Mapping[str, str]:
    """What becomes of each tensor of the (first) source: nothing is unaccounted for."""
    fate: dict[str, str] = {}
    for tensor in plan.tensors:
        if tensor.role != "copy":
            continue
        stored = sources[0].tensors[tensor.source]
        verb = "copied" if stored.shape == tensor.shape else f"sliced: rows {stored.shape[0]} -> {tensor.shape[0]}"
        if stored.dtype != tensor.dtype:
            verb += f", {stored.dtype} -> {tensor.dtype}"
        fate[tensor.source] = verb if tensor.name == tensor.source else f"{fate[tensor.source]}; also as {tensor.name}"
    shared = " and the shared one" if plan.target.shared_intermediate_size else ""
    for layer_id, layout in plan.target.layouts.items():
        for matrix in MATRICES:
            fate[names.dense_ffn(layer_id, matrix)] = f"derived: {layout.num_experts} experts{shared}"
    for name in sources[0].tensors:
        if name not in fate:
            fate[name] = "dropped: tied to embed_tokens"
    return fate
