"""merge.json of a merged folder: what was merged and how, tensor by tensor, so that it can be told again and checked.

    {"format_version": 1, "moelab": "...", "algorithm": "xxh3-128", "merge": {options}, "seed": 0, "dtype": "float32",
     "sources": [{"key": "base", "folder": "/...", "checksum": "..."}, ...],
     "tensors": {"layers.0.mlp.experts.down": {"shape": [...], "checksum": "...", "sources": ["...", ...],
                                               "changed": [...], "kept": [...], "agreeing": [...]}}}

A tensor's `checksum` is of its bytes as they were written, in our layout; `sources` are those of its float32 values in
each source, in the order in which experts were taken; a source's own is that of all of them. `changed`: numbers that
each model has otherwise than the base; `kept`: of these those that a sparse method left; `agreeing`: of these those
whose sign is the elected one. It finds damage and mistaken folders, not forgery.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moelab
from moelab.across_versions import as_ever
from moelab.checksums import ALGORITHM, checksum
from moelab.errors import CheckpointError, RunFailure
from moelab.integrity import verified
from moelab.loading import open_weights
from moelab.records import Record
from moelab.registry import Registry
from moelab.safe_files import Reading, read_object
from moelab.tensor_parts import Stored
from moelab_tools.merging.declaration import MergeConfig
from moelab_tools.waiting import Waiting

REPORT = "merge.json"
FORMAT_VERSION = 1
READING = Reading(CheckpointError, "merge again")
SHOWN = 5  # tensors that a message names


@dataclass
class TensorAccount:
    """What became of one tensor."""

    shape: tuple[int, ...]
    checksum: str = ""
    sources: list[str] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    agreeing: list[int] = field(default_factory=list)

    def count(self, into: list[int], masks: Sequence[Tensor]) -> None:
        """Add up True values, of each model."""
        found = [int(mask.sum()) for mask in masks]
        into[:] = found if not into else [a + b for a, b in zip(into, found, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Lists that are empty, as a method has no such counts, are left out."""
        told = {key: value for key, value in vars(self).items() if value}
        return {**told, "shape": list(self.shape)}


def bytes_of(tensor: Tensor) -> memoryview:
    """Of a tensor on the CPU, in C order."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def report(
    identity: Mapping[str, Any], sources: Sequence[tuple[str, Path]], dtype: str, tensors: Mapping[str, TensorAccount]
) -> bytes:
    """The file. `identity`: the options and the seed; `sources`: (key, folder)."""
    told = []
    for place, (key, folder) in enumerate(sources):
        parts = [f"{name} {one.sources[place]}\n" for name, one in sorted(tensors.items()) if place < len(one.sources)]
        told.append({"key": key, "folder": str(folder), "checksum": checksum("".join(parts).encode())})
    content = {
        "format_version": FORMAT_VERSION, "moelab": moelab.__version__, "algorithm": ALGORITHM, **identity,
        "dtype": dtype, "sources": told, "tensors": {name: one.to_json() for name, one in tensors.items()},
    }  # fmt: skip
    return (json.dumps(content, indent=1) + "\n").encode()


def read_report(folder: Path) -> Record:
    """Raises CheckpointError where it is none, or of another format."""
    path = folder / REPORT
    record = Record(str(path), read_object(path, READING), READING)
    if record.integer("format_version") > FORMAT_VERSION or record.text("algorithm") != ALGORITHM:
        READING.refuse(path, "is of another format than this moelab reads")
    return record


def verify_merged(folder: Path, registry: Registry | None = None) -> str:
    """Compare every tensor of a merged folder with what was written, without its sources; -> what was compared.

    Raises RunFailure naming what differs, CheckpointError for a folder or a merge.json that can't be read.
    """
    said = read_report(folder)
    stored: Mapping[str, Stored] = open_weights(verified(folder), registry=registry).stored  # type: ignore[attr-defined]
    tensors = dict(said.record("tensors").records())
    if tensors.keys() != stored.keys():
        other = sorted(tensors.keys() ^ stored.keys())
        raise RunFailure(f"{folder}: holds other tensors than its {REPORT} tells of: {', '.join(other[:SHOWN])}")
    wrong, size = [], 0
    with Waiting("verifying, tensors", len(tensors)) as waiting:
        for name, entry in tensors.items():
            found = stored[name].read()
            size += found.nbytes
            if checksum(bytes_of(found)) != entry.text("checksum"):
                wrong.append(name)
            waiting.step()
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise RunFailure(f"{folder}: changed after it was merged: {', '.join(wrong[:SHOWN])}{more}")
    sources = [Record(f"{folder}: source", one, READING) for one in said.listed("sources", dict)]
    names = ", ".join(one.text("folder") for one in sources)
    method = said.record("merge").text("method")
    return f"{folder}: as it was merged, {len(tensors)} tensors, {size / 1e9:.3f} GB: {method} of {names}"


def compare_options(said: Record, identity: Mapping[str, Any], registry: Registry) -> None:
    """Raise RunFailure where the folder was merged by other options, naming the first one."""
    then = {**as_ever(said.record("merge").values, MergeConfig, registry), "seed": said.values.get("seed")}
    now = {**identity["merge"], "seed": identity["seed"]}
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            raise RunFailure(f"{said.where}: was merged otherwise: {key} is {then.get(key)} there, {now.get(key)} here")


def compare_sources(said: Record, name: str, found: Sequence[str], sources: Sequence[tuple[str, Path]]) -> None:
    """Raise RunFailure where a source holds another tensor than the one that was merged. `sources`: (key, folder)."""
    then = said.record("tensors").record(name).listed("sources", str)
    for before, now, (key, folder) in zip(then, found, sources, strict=False):
        if before != now:
            raise RunFailure(f"{key}: '{name}' of {folder} is not what was merged: it was changed, or is another one")
