"""Recomputes an upcycled checkpoint from its sources and its recipe, and compares bytes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab.config.model import ModelConfig
from moelab.config.typed import OPTIONS
from moelab.config.upcycle import UpcycleConfig
from moelab.errors import CheckpointError, ConfigError
from moelab.hf.config import described_by
from moelab.hf.fields import Fields
from moelab.hf.files import INDEX_FILE, READING, read_json, refuse_two_readings
from moelab.paths import user_path
from moelab.records import Record, read_record
from moelab.trust import refuse_unknown
from moelab_upcycling.convert import prepare, registry_of
from moelab_upcycling.dtypes import STORAGE, TORCH_NAMES, raw_bytes
from moelab_upcycling.maker import Maker
from moelab_upcycling.output import PLAN_FILE
from moelab_upcycling.plan import OutputTensor, Plan, Shard
from moelab_upcycling.same_plan import hash_there
from moelab_upcycling.source import DenseSource
from moelab_upcycling.streams import choose, stream

_SAMPLED = 0.01  # of a layer's experts, at least one


@dataclass
class Verdict:
    """What was compared, and what differs."""

    tensors: int = 0
    nbytes: int = 0
    total: int = 0
    differences: list[str] = field(default_factory=list)


def plan_of_output(
    output: Path, sources: Sequence[Path], search_path: Sequence[Path] = (), *, trust: bool = False
) -> Plan:
    """The plan that `output` says it was made by, over the given sources. CheckpointError where they don't fit.

    The initialisers of a plugin that it names are imported with `trust` alone, from `search_path` or where it says.
    """
    stored = read_record(output / PLAN_FILE, READING)
    named = stored.listed("search_path", str, optional=True)
    if not trust:
        refuse_unknown(stored.record("identity").listed("plugins", str), output / PLAN_FILE, named)
    config = _config_of(stored, sources)
    paths = [*search_path, *(user_path(path, f"{PLAN_FILE}: search_path") for path in named if trust)]
    registry = registry_of(config, paths)
    plan = prepare(config, registry, paths)
    if list(plan.fingerprints) != stored.record("identity").listed("fingerprints", str):
        raise CheckpointError(
            f"{output / PLAN_FILE}: was made from other sources than {', '.join(map(str, sources))} (other "
            "fingerprints); name the ones it was made from: " + ", ".join(stored.listed("sources", str, optional=True))
        )
    if hash_there(stored, plan, registry) is None:
        raise CheckpointError(
            f"{output / PLAN_FILE}: this version of moelab makes another plan of the same recipe; verify with the "
            f"version that made it: {json.dumps(dict(stored.record('versions', optional=True).values))}"
        )
    return plan


def _config_of(stored: Record, sources: Sequence[Path]) -> UpcycleConfig:
    """The recipe that upcycle.json describes, over these sources."""
    identity = stored.record("identity")
    described, recipe = identity.record("config"), identity.record("recipe")
    output = described_by(Fields(Path(f"{stored.where}: identity.config"), described.values))
    if output.config.moe is None:
        described.refuse("model_type", "of a model with experts")
    dtype = identity.text("dtype")
    if dtype not in TORCH_NAMES:
        identity.refuse("dtype", f"one of {', '.join(TORCH_NAMES)}")
    tree = {
        "source": [str(source) for source in sources],
        "model": _model_node(output.config),
        "target": output.model_type,
        "recipe": dict(recipe.values),
        "seed": identity.integer("seed"),
        "dtype": TORCH_NAMES[dtype],
        "untie": not output.config.tie_word_embeddings,
        "max_shard_size": str(identity.integer("max_shard_size", least=1)),
        "plugins": identity.listed("plugins", str),
        "entry_points": stored.flag("entry_points", True),
    }
    try:
        config = OPTIONS.build(UpcycleConfig, tree)
        config.check()
    except ConfigError as error:
        raise CheckpointError(f"{stored.where}: can't be used: {error}; {READING.cure}") from error
    return config


def _model_node(model: ModelConfig) -> dict[str, Any]:
    """The recipe's `model`, from the model that it led to."""
    free = ("vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "initializer_range")
    assert model.moe is not None
    parts = {key: getattr(model.moe, key) for key in ("layout", "router", "shared_expert")}
    return {**{key: getattr(model, key) for key in free}, "moe": parts}


def verify(
    output: Path,
    plan: Plan,
    *,
    full: bool = False,
    layers: range | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
    announce: Callable[[int], None] = lambda nbytes: None,
) -> Verdict:
    """Compare headers, and tensors: all of them, or one in a hundred experts and whatever is no expert.

    Raises CheckpointError where `output` could be read in two ways, or a source can't be read.
    """
    refuse_two_readings(output)
    verdict = Verdict(total=len(plan.tensors))
    shards = [shard for shard in plan.shards if layers is None or shard.layer_id in layers]
    verdict.differences += _check_index(output, plan)
    chosen = {shard.file: _chosen(shard, plan, full) for shard in shards}
    announce(sum(tensor.nbytes for tensors in chosen.values() for tensor, _ in tensors))
    registry = registry_of(
        UpcycleConfig(plugins=list(plan.plugins), entry_points=plan.entry_points), [Path(p) for p in plan.search_path]
    )
    sources = [DenseSource(Path(folder), registry) for folder in plan.sources]
    maker = Maker(plan, registry, sources)
    try:
        for shard in shards:
            _compare_shard(output / shard.file, shard, chosen[shard.file], maker, verdict, progress)
    finally:
        for source in sources:
            source.close()
    return verdict


def _check_index(output: Path, plan: Plan) -> list[str]:
    if not (output / INDEX_FILE).exists():
        return [f"{output / INDEX_FILE}: is missing, so the checkpoint is not complete; run the conversion again"]
    wanted = {tensor.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    found = read_json(output / INDEX_FILE).get("weight_map")
    differences = [] if found == wanted else [f"{output / INDEX_FILE}: does not list the planned tensors"]
    config = read_json(output / "config.json")
    differing = [key for key, value in plan.config_json().items() if config.get(key) != value]
    if differing:
        differences.append(f"{output / 'config.json'}: {', '.join(differing)} changed since the conversion")
    return differences


def _chosen(shard: Shard, plan: Plan, full: bool) -> list[tuple[OutputTensor, int]]:
    """(tensor, offset) of what is to be compared."""
    placed = list(zip(shard.tensors, shard.offsets, strict=True))
    layout = plan.target.layouts.get(shard.layer_id)
    if full or layout is None:
        return placed
    count = max(1, round(_SAMPLED * layout.num_experts))
    sample = choose(stream(plan.seed, "verify/1", shard.layer_id, "sample"), layout.num_experts, count)
    return [(tensor, offset) for tensor, offset in placed if tensor.role != "expert" or sample[tensor.expert]]


def _compare_shard(
    path: Path,
    shard: Shard,
    chosen: list[tuple[OutputTensor, int]],
    maker: Maker,
    verdict: Verdict,
    progress: Callable[[int], None],
) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        verdict.differences.append(f"{path}: can't be opened: {error.strerror}")
        return
    try:
        size = os.fstat(descriptor).st_size
        if size != shard.nbytes:
            verdict.differences.append(f"{path}: has {size} bytes, should have {shard.nbytes}")
            return
        if os.pread(descriptor, len(shard.header), 0) != shard.header:
            verdict.differences.append(f"{path}: its header is not the planned one")
            return
        for tensor, offset in chosen:
            begin = len(shard.header) + offset
            wrong = _first_difference(descriptor, begin, maker.make(tensor))
            if wrong is not None:
                width = math.prod(tensor.shape[1:])
                row, column = divmod((wrong - begin) // STORAGE[tensor.dtype].itemsize, width)
                place = f"'{tensor.name}' differs at row {row}, column {column}"
                verdict.differences.append(f"{path}: byte {wrong}: {place}")
            verdict.tensors += 1
            verdict.nbytes += tensor.nbytes
            progress(tensor.nbytes)
    finally:
        os.close(descriptor)


def _first_difference(descriptor: int, offset: int, pieces: Iterator[npt.NDArray[Any]]) -> int | None:
    """The file position of the first byte that differs."""
    for piece in pieces:
        wanted = np.frombuffer(raw_bytes(piece), dtype=np.uint8)
        found = np.empty_like(wanted)
        done = 0
        while done < len(found):
            count = os.preadv(descriptor, [found[done:].data], offset + done)
            if count == 0:
                return offset + done
            done += count
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, len(found), os.POSIX_FADV_DONTNEED)
        if not np.array_equal(found, wanted):
            return offset + int(np.flatnonzero(found != wanted)[0])
        offset += len(found)
    return None
