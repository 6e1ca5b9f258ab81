"""The one reader of strangers' files: a value or one error that names path, place, problem and cure; never a wait."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moelab.errors import CheckpointError
from moelab.safe_files import (
    DEEPEST,
    Reading,
    check_regular,
    json_lines,
    lines_from_end,
    map_array,
    parse_json,
    read_bytes,
    read_json,
    read_object,
    read_tensor_header,
    read_text,
)

READING = Reading(CheckpointError, "take it from the source again")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**39), 10**39) | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner),
    max_leaves=20,
)  # fmt: skip


@example(-(10**39))  # a sign is no digit
@given(TREES)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_what_json_spells_is_read_back(tree: object) -> None:
    assert parse_json(json.dumps(tree), "here", READING) == tree
    assert parse_json(json.dumps(tree, ensure_ascii=False).encode(), "here", READING) == tree


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "is not JSON at character 2"),
        (b'{\n"a": 1,\n', "is not JSON at line 3"),
        (b"\xff{}", "is no UTF-8 text (byte 0: 0xff)"),
        (b"[" * 30_000 + b"]" * 30_000, "nested too deeply"),
        (b"[" * (DEEPEST + 2) + b"]" * (DEEPEST + 2), "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
        (b'{"a": ' + b"9" * 41 + b"}", "an integer of 41 digits"),
        (b'{"a": 1e999}', "beyond all bounds"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b'{"a": {"\\u001b[2J": 1, "\\u001b[2J": 2}}', "\\x1b[2J"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b"[[], [], []]" + b"," * 16_000_001, "more than"),
        (b"", "is not JSON"),
    ],
)
def test_what_is_no_decent_json_is_refused_by_one_message(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_json(path, READING)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert problem in message
    assert message.endswith("; take it from the source again")
    assert len(message) < 2000


def test_brackets_in_texts_are_no_depth() -> None:
    value = ["[" * 500, {"{": "]" * 500}]
    assert parse_json(json.dumps(value), "here", READING) == value


def test_numbers_that_moelab_writes_of_metrics_are_read_where_asked() -> None:
    assert math.isnan(parse_json('{"a": NaN}', "here", READING, finite=False)["a"])
    assert parse_json('{"a": [1e999, -Infinity]}', "here", READING, finite=False)["a"] == [math.inf, -math.inf]


def _fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [_fifo, Path.mkdir, lambda path: None, lambda path: path.symlink_to(path)])
@pytest.mark.parametrize("read", [read_bytes, read_text, read_json, check_regular, read_tensor_header, map_array])
def test_what_is_no_regular_file_is_refused_without_waiting(
    tmp_path: Path, make: Callable[[Path], None], read: Callable[[Path, Reading], object]
) -> None:
    path = tmp_path / "x.npy"
    make(path)
    with pytest.raises(CheckpointError, match=r"x\.npy"):
        read(path, READING)


def test_a_file_beyond_its_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CheckpointError, match="1099511627776 bytes, more than"):
        read_text(path, READING)


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert read_object(path, READING) == {}


def test_an_object_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list, not an object"):
        read_object(path, READING)


def test_lines_are_named_and_a_torn_last_one_is_forgiven_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": ')
    rows = json_lines(path, READING, torn=True)
    assert list(rows) == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": 2})]
    with pytest.raises(CheckpointError, match=r"x\.jsonl:4: is not JSON"):
        list(json_lines(path, READING))
    path.write_text('{"a": \n{"a": 2}\n')
    with pytest.raises(CheckpointError, match=r"x\.jsonl:1: is not JSON"):
        list(json_lines(path, READING, torn=True))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "0 bytes"),
        (b"\x05\x00\x00", "3 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", "truncated or damaged"),
        ((3).to_bytes(8, "little") + b"{}", "truncated or damaged"),
        ((2).to_bytes(8, "little") + b"[]", "holds a list"),
        ((60_000).to_bytes(8, "little") + b"[" * 60_000, "nested too deeply"),
    ],
)
def test_a_tensor_header_is_no_larger_than_its_file(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=problem):
        read_tensor_header(path, READING)


@pytest.mark.parametrize("header", [b"{", b"{'descr': '<i4', 'shape': (99999999999999999999,)}", b"(" * 50, b"\0" * 20])
def test_a_damaged_npy_header_is_one_message(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"1234")
    with pytest.raises(CheckpointError, match=r"is no \.npy array"):
        map_array(path, READING)


def test_an_npy_file_with_another_behind_it_is_refused_and_so_are_pickled_objects(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(5))
    two = (tmp_path / "x.npy").read_bytes() * 2
    (tmp_path / "two.npy").write_bytes(two)
    with pytest.raises(CheckpointError, match=f"has {len(two)} bytes, and its header speaks of {len(two) // 2}"):
        map_array(tmp_path / "two.npy", READING)
    (tmp_path / "p.npy").write_bytes(pickle.dumps([1]))
    with pytest.raises(
        CheckpointError, match=r"no \.npy array: it has no such header, or holds pickled objects"
    ) as found:
        map_array(tmp_path / "p.npy", READING)
    assert "allow_pickle" not in str(found.value)


def test_a_whole_npy_file_is_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(5))
    assert map_array(tmp_path / "x.npy", READING).tolist() == [0, 1, 2, 3, 4]
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"o\.npy"):
        map_array(tmp_path / "o.npy", READING)


def test_reading_asks_for_no_more_memory_than_the_file_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_text("small")
    asked: list[int] = []
    opened = os.fdopen

    def watched(descriptor: int, mode: str) -> object:
        file = opened(descriptor, mode)
        read = file.read

        class Watched:
            def __enter__(self) -> Watched:
                return self

            def __exit__(self, *error: object) -> None:
                file.close()

            def read(self, count: int) -> bytes:
                asked.append(count)
                return read(count)

        return Watched()

    monkeypatch.setattr(os, "fdopen", watched)
    assert read_bytes(tmp_path / "x", READING, limit=1 << 40) == b"small"
    assert max(asked) <= 1 << 20


def test_lines_come_from_the_end_whatever_the_blocks(tmp_path: Path) -> None:
    """Longer and shorter than a block, empty ones, and what stands behind the last line feed left out."""
    lines = [b"first", b"", b"x" * 300_000, b"y", *(str(number).encode() for number in range(50_000))]
    path = tmp_path / "lines"
    for end in (b"", b"torn"):
        path.write_bytes(b"\n".join(lines) + b"\n" + end)
        assert list(lines_from_end(path, Reading())) == lines[::-1]
    assert next(lines_from_end(path, Reading())) == b"49999"
    path.write_bytes(b"torn alone" * 100_000)
    assert list(lines_from_end(path, Reading())) == []
    path.write_bytes(b"cut\nb\nc\n")
    assert list(lines_from_end(path, Reading(), limit=6)) == [b"c", b"b"]
    assert list(lines_from_end(tmp_path / "lines", Reading(), limit=0)) == []
