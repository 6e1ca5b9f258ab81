"""A trace says who went where, to the last digit, to any reader that knows safetensors and JSON; damage is found."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moelab
from moelab.config.model import ModelConfig
from moelab.errors import ConfigError, DataError, UserError
from moelab.routes.files import HEAD, ROUTES, read_trace, write_trace
from traced_models import make_trace, traced

ROUTERS: list[dict[str, Any]] = [
    {"name": "softmax_topk"}, {"name": "top_p", "top_p": 0.5}, {"name": "null_experts", "num_null_experts": 4},
    {"name": "softmax_topk", "eval_capacity_factor": 0.7}, {"name": "expert_choice"},
]  # fmt: skip
TYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "F32": np.float32}


def _read_by_hand(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The documented format, read without safetensors, xxhash or moelab."""
    content = (folder / "routes.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    arrays = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        arrays[name] = np.frombuffer(content[begin:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
    return json.loads((folder / "trace.json").read_text()), arrays


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_independent_numpy_finds_the_models_own_routes_in_the_files(tmp_path: Path, router: Any):
    model, trace = traced(router)
    write_trace(trace, tmp_path / "t")
    head, arrays = _read_by_hand(tmp_path / "t")
    counts = {entry["layer"]: np.zeros(8, np.int64) for entry in head["layers"]}
    weights = {entry["layer"]: np.zeros((head["windows"] * head["window_tokens"], 8)) for entry in head["layers"]}
    dropped = dict.fromkeys(counts, 0)
    for first in range(0, head["windows"], head["batch_size"]):
        ids = torch.from_numpy(arrays["token_id"][first : first + head["batch_size"]].astype(np.int64))
        for record in model(ids).records:
            routing = record.routing
            counts[record.layer_id] += record.counts.numpy()
            dropped[record.layer_id] += 0 if routing.dropped is None else int(routing.dropped)
            dense = torch.zeros(routing.num_tokens, 8)
            dense.index_put_((routing.token, routing.expert), routing.weight, accumulate=True)  # placeholders: 0
            weights[record.layer_id][first * head["window_tokens"] :][: len(dense)] = dense.numpy()
    for entry in head["layers"]:
        name = f"layer_{entry['layer']:02d}"
        expert, weight = arrays[f"{name}.expert"], arrays[f"{name}.weight"]
        assert np.array_equal(np.bincount(expert, minlength=8), counts[entry["layer"]])
        per_token = arrays.get(f"{name}.per_token")
        if entry["top_k"] is not None:
            assert per_token is None
            per_token = np.full(head["windows"] * head["window_tokens"], entry["top_k"])
        token = np.repeat(np.arange(len(per_token)), per_token)
        dense = np.zeros_like(weights[entry["layer"]])
        dense[token, expert] = weight
        assert np.array_equal(dense, weights[entry["layer"]])
        assert entry["dropped"] == dropped[entry["layer"]]


def test_the_text_in_a_trace_is_what_the_model_read(tmp_path: Path):
    trace = traced({"name": "softmax_topk"})[1]
    assert trace.windows == 11
    assert np.array_equal(trace.target_id[:, :-1], trace.token_id[:, 1:])
    assert np.array_equal(trace.position, np.tile(np.arange(16), (11, 1)))
    assert trace.documents == [("a", "x"), ("b", "y"), ("c", "x")]
    assert np.bincount(trace.document_id.ravel()).tolist() == [30, 70, 76]
    assert trace.token_id.dtype == trace.layers[0].expert.dtype == np.uint8


def test_what_is_written_is_read(tmp_path: Path):
    trace = traced({"name": "top_p", "top_p": 0.5})[1]
    write_trace(trace, tmp_path / "t")
    again = read_trace(tmp_path / "t")
    assert (again.facts, again.documents) == (trace.facts, trace.documents)
    for (name, array), (other, found) in zip(trace.arrays(), again.arrays(), strict=True):
        assert name == other
        assert array.dtype == found.dtype
        assert np.array_equal(array, found)


def test_every_changed_byte_is_found(tmp_path: Path):
    write_trace(traced({"name": "softmax_topk"})[1], tmp_path / "t")
    for name in (HEAD, ROUTES):
        path = tmp_path / "t" / name
        whole = path.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 60)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(UserError, match=r"record the trace again|newer moelab"):
                read_trace(tmp_path / "t")
        for size in (0, 7, len(whole) // 2, len(whole) - 2):
            path.write_bytes(whole[:size])
            with pytest.raises(UserError, match="record the trace again"):
                read_trace(tmp_path / "t")
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("version", 99, "newer moelab"), ("format", "else", "no head"), ("windows", 10**9, "is uint8"),
        ("windows", 0, "windows"), ("batch_size", 0, "batch_size"), ("vocab_size", 3, "not below 3"),
        ("layers", [], "none"), ("documents", [{"name": "a", "domain": "x"}], "not below 1"),
    ],
)  # fmt: skip
def test_a_head_that_promises_too_much_is_refused_though_its_hash_is_right(
    tmp_path: Path, key: str, value: Any, told: str
):
    write_trace(traced({"name": "softmax_topk"})[1], tmp_path / "t")
    head = json.loads((tmp_path / "t" / HEAD).read_text())
    head[key] = value
    del head["sha256"]
    text = json.dumps(head, sort_keys=True, separators=(",", ":"))
    (tmp_path / "t" / HEAD).write_text(json.dumps(head | {"sha256": hashlib.sha256(text.encode()).hexdigest()}))
    with pytest.raises(DataError, match=told):
        read_trace(tmp_path / "t")


def test_experts_that_are_not_there_are_refused(tmp_path: Path):
    trace = traced({"name": "softmax_topk"})[1]
    wrong = replace(trace.layers[0], expert=trace.layers[0].expert + np.uint8(1))
    write_trace(replace(trace, layers=[wrong]), tmp_path / "t")
    with pytest.raises(DataError, match="beyond 7"):
        read_trace(tmp_path / "t")


def test_nothing_is_written_over(tmp_path: Path):
    trace = traced({"name": "softmax_topk"})[1]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine").write_text("kept")
    with pytest.raises(UserError, match="there already"):
        write_trace(trace, tmp_path / "t")
    assert [path.name for path in tmp_path.rglob("*")] == ["t", "mine"]


def test_a_model_without_experts_has_no_routes():
    dense = moelab.build(ModelConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    ))  # fmt: skip
    with pytest.raises(ConfigError, match="no MoE layer"):
        make_trace(dense)


def test_a_type_that_numpy_does_not_have_is_refused(tmp_path: Path):
    write_trace(traced({"name": "softmax_topk"})[1], tmp_path / "t")
    path = tmp_path / "t" / "routes.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    one = next(entry for entry in header.values() if entry.get("dtype") in ("U8", "I8", "BOOL"))
    one["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(UserError, match=r"routes\.safetensors"):
        read_trace(tmp_path / "t")
