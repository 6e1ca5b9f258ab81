"""Traces on disk: a folder with trace.json and routes.safetensors, checksummed, whole or absent, never pickled.

A reader believes nothing: sizes, types, ranges and checksums are looked at before a route is replayed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moelab.atomic import check_place, partial, put_in_place, sync
from moelab.checksums import ALGORITHM, checksum
from moelab.errors import DataError, UserError
from moelab.records import Record, read_record
from moelab.routes.trace import TOKEN_ARRAYS, LayerTrace, Trace
from moelab.safe_files import Reading, read_arrays

HEAD, ROUTES = "trace.json", "routes.safetensors"
FORMAT, VERSION = "moelab trace", 1
READING = Reading(DataError, "record the trace again with `moelab trace`")
_FACTS = ("moelab", "source", "weights", "tokenizer", "vocab_size", "batch_size", "precision", "data")


def write_trace(trace: Trace, folder: Path) -> None:
    """Write all of it, or nothing. Raises UserError where the folder exists or can't be made."""
    from safetensors.numpy import save  # noqa: PLC0415  (commands are listed without it)

    check_place(folder, "--out")
    arrays = {name: np.ascontiguousarray(array) for name, array in trace.arrays()}
    head = {
        "format": FORMAT,
        "version": VERSION,
        **trace.facts,
        "windows": trace.windows,
        "window_tokens": int(trace.token_id.shape[1]),
        "layers": [_layer_facts(layer) for layer in trace.layers],
        "documents": [{"name": name, "domain": domain} for name, domain in trace.documents],
        "arrays": {name: _array_facts(array) for name, array in arrays.items()},
    }
    head["sha256"] = _own_hash(head)
    beside = partial(folder)
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        (beside / ROUTES).write_bytes(save(arrays))
        (beside / HEAD).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
        for path in (*beside.iterdir(), beside):
            sync(path)
        put_in_place(beside, folder)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"--out {folder}: can't be written ({error.strerror}); choose another folder") from error


def read_trace(folder: Path) -> Trace:
    """The trace in `folder`. Raises DataError naming the file, what is wrong and the cure."""
    if not (folder / HEAD).is_file():
        raise DataError(f"{folder}: holds no trace (no {HEAD}); give a folder that `moelab trace` wrote")
    head, entries = _read_head(folder / HEAD)
    named = [
        Record(f"{folder / HEAD}: documents.{i}", d, READING) for i, d in enumerate(head.listed("documents", dict))
    ]
    documents = [(one.text("name"), one.text("domain")) for one in named]
    arrays = _read_arrays(folder / ROUTES, head.record("arrays").values)
    shape = (head.integer("windows"), head.integer("window_tokens"))
    _check_tokens(arrays, shape, {"documents": len(documents), "ids": head.integer("vocab_size")}, folder / ROUTES)
    layers = [_layer(entry, arrays, folder / ROUTES, shape[0] * shape[1]) for entry in entries]
    facts = {key: head.values[key] for key in _FACTS}
    return Trace(**{name: arrays[name] for name in TOKEN_ARRAYS}, documents=documents, layers=layers, facts=facts)


def _layer_facts(layer: LayerTrace) -> dict[str, Any]:
    return {
        "layer": layer.layer_id, "num_experts": layer.num_experts, "router": layer.router, "top_k": layer.top_k,
        "served": len(layer.expert), "dropped": layer.dropped, "other_choices": layer.other_choices,
    }  # fmt: skip


def _array_facts(array: np.ndarray) -> dict[str, Any]:
    return {"dtype": array.dtype.name, "shape": list(array.shape), ALGORITHM: array_hash(array)}


def array_hash(array: np.ndarray) -> str:
    """xxh3-128 of an array's bytes in C order."""
    return checksum(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _own_hash(head: Mapping[str, Any]) -> str:
    """sha256 of the head without this entry, as JSON with sorted keys and no white space."""
    rest = {key: value for key, value in head.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_head(path: Path) -> tuple[Record, list[Record]]:
    """(the head, one record a layer), of a known version, undamaged, with whatever is needed in range."""
    head = read_record(path, READING)
    if head.text("format", "") != FORMAT:
        READING.refuse(path, "is no head of a moelab trace")
    version = head.integer("version", least=1)
    if version > VERSION:
        raise DataError(f"{path}: is of version {version}, and this moelab reads up to {VERSION}; use a newer moelab")
    if head.text("sha256") != _own_hash(head.values):
        READING.refuse(path, "does not have the sha256 that it says: it was changed or is damaged")
    for key in ("windows", "window_tokens", "batch_size", "vocab_size"):
        head.integer(key, least=1, most=1 << 40)
    for key in ("weights", "tokenizer", "source", "moelab"):
        head.text(key)
    for key in ("precision", "data", "arrays"):
        head.record(key)
    layers = [Record(f"{path}: layers.{i}", one, READING) for i, one in enumerate(head.listed("layers", dict))]
    for layer in layers:
        experts = layer.integer("num_experts", least=1, most=1 << 24)
        layer.integer("top_k", None, least=1, most=experts)
        layer.text("router")
        for key in ("layer", "served", "dropped", "other_choices"):
            layer.integer(key, least=0, most=1 << 48)
    numbers = [layer.integer("layer") for layer in layers]
    if not numbers or numbers != sorted(set(numbers)):
        READING.refuse(path, f"its layers are {numbers[:9]}: none, or not from the lowest up")
    return head, layers


def _read_arrays(path: Path, told: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All arrays that the head names, each of its type, shape and checksum."""
    arrays = read_arrays(path, READING)
    if arrays.keys() != told.keys():
        READING.refuse(path, f"does not hold the arrays of {HEAD}: {sorted(arrays.keys() ^ told.keys())[:3]}")
    for name, array in arrays.items():
        if _array_facts(array) != told[name]:
            READING.refuse(path, f"'{name}' does not have the type, shape and xxh3-128 of {HEAD}: damaged or changed")
    return arrays


def _array(arrays: dict[str, np.ndarray], name: str, kind: str, shape: tuple[int, ...], path: Path) -> np.ndarray:
    array = arrays.get(name)
    if array is None or array.dtype.kind != kind or array.shape != shape:
        found = "is missing" if array is None else f"is {array.dtype.name} {array.shape}"
        READING.refuse(path, f"'{name}' {found}, where its head speaks of {shape}")
    return array


def _check_tokens(arrays: dict[str, np.ndarray], shape: tuple[int, int], most: dict[str, int], path: Path) -> None:
    limits = {"document_id": most["documents"], "target_document_id": most["documents"], "position": shape[1]}
    for name in TOKEN_ARRAYS:
        array = _array(arrays, name, "u", shape, path)
        limit = limits.get(name, most["ids"])
        if int(array.max()) >= limit:
            READING.refuse(path, f"'{name}' holds numbers that are not below {limit}")


def _layer(entry: Record, arrays: dict[str, np.ndarray], path: Path, tokens: int) -> LayerTrace:
    """The layer's arrays, if they make sense together."""
    layer, experts, top_k = entry.integer("layer"), entry.integer("num_experts"), entry.integer("top_k", None)
    name, served = f"layer_{layer:02d}", (entry.integer("served"),)
    expert = _array(arrays, f"{name}.expert", "u", served, path)
    weight = _array(arrays, f"{name}.weight", "f", served, path)
    per_token = None if top_k is not None else _array(arrays, f"{name}.per_token", "u", (tokens,), path)
    if weight.dtype != np.float32 or not np.isfinite(weight).all():
        READING.refuse(path, f"'{name}.weight' holds what is no finite float32")
    held = int(per_token.sum(dtype=np.int64)) if per_token is not None else tokens * (top_k or 0)
    if held != len(expert):
        READING.refuse(path, f"'{name}.expert' holds {len(expert)} assignments, and its tokens have {held}")
    if int(expert.max(initial=0)) >= experts:
        READING.refuse(path, f"'{name}.expert' holds an expert beyond {experts - 1}")
    return LayerTrace(
        layer, experts, entry.text("router"), top_k, expert, weight, per_token,
        entry.integer("dropped"), entry.integer("other_choices"),
    )  # fmt: skip
