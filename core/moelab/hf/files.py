"""The one reader of a folder of safetensors, free of torch: headers first, everything checked, then weights.

What a folder holds is decided here and nowhere else, so that loading, upcycling, verifying and exporting can't read one
folder in two ways. Never unpickles.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from moelab.atomic import where_it_may_be
from moelab.errors import CheckpointError
from moelab.hf.gguf_file import TYPES, GGUFFile, decode, gguf_of, halves
from moelab.paths import looked_in
from moelab.records import Record
from moelab.safe_files import Reading, read_object, read_tensor_header

if TYPE_CHECKING:
    from torch import Tensor

A_CHECKPOINT = "a folder with config.json and .safetensors files"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
HEAD = "lm_head.weight"
_FUSED = re.compile(r"(qkv|query_key_value|W_pack|c_attn|gate_up|gate_and_up|wqkv)", re.IGNORECASE)
FLOATS = ("F64", "F32", "BF16", "F16")
SHOWN = 5  # names in a message
READING = Reading(CheckpointError)
_PIECE = 8 << 20  # bytes compared at a time


@dataclass(frozen=True)
class StoredTensor:
    """One header entry, and where its bytes lie."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32, BF16, ...
    offset: int  # of its first byte in the file
    nbytes: int  # as stored
    key: str = ""  # what the file calls it, where that is not `name`
    first: int = 0  # row of the tensor `key`, where it is a part of it
    encoding: str = ""  # of a GGUF file: its type there; `dtype` is what it is decoded to
    scales: StoredTensor | None = None  # of MXFP4 (hf/mxfp4.py; `dtype` is what it is decoded to), or of blocks:
    block: tuple[int, int] = (0, 0)  # so many numbers each (hf/scaled_blocks.py)
    paired_heads: int = 0  # rows of so many heads lie in llama.cpp's order (hf/gguf_file.py: halves)

    @property
    def is_plain(self) -> bool:
        """Whether the bytes in the file are the values, in order."""
        plain = self.encoding in ("", "F32", "F16", "BF16") and not self.paired_heads
        return plain and self.scales is None

    def decoded(self, raw: np.ndarray, heads: int = 0) -> np.ndarray:
        """Stored rows [n, bytes of a row] -> [n, columns]; of rotated ones as many as `heads` have."""
        values = decode(raw, self.encoding)
        return halves(values, heads) if heads else values


class TensorFolder:
    """The tensors of a checkpoint folder, by name. Opening it reads every header and no weights."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for absent, truncated or garbled files, and for what could be read in two ways.

        `folder` may be a GGUF file, whose tensors get the names that Hugging Face's layout has for them.
        """
        self.folder = folder
        gguf = gguf_of(folder)
        if gguf is not None:
            self.tensors = _read_gguf(gguf)
            return
        refuse_two_readings(folder)
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if single.exists():
            self.tensors = read_header(single)
        elif index.exists():
            self.tensors = _read_shards(index)
        else:
            raise CheckpointError(_nothing_to_read(folder))

    def check(self, expected: Mapping[str, tuple[int, ...]], tied: tuple[str, str] | None = None) -> None:
        """Exactly these tensors, of these shapes, in floating point.

        `tied`: (head, embedding) of a model that ties the first to the second. The head may be stored too, if it
        holds the same bytes.
        """
        found = self.tensors
        missing = [name for name in expected if name not in found]
        unexpected = sorted(found.keys() - expected.keys() - set((tied or ())[:1]))
        problems = [
            f"{found[name].path}: {name}: has shape {list(found[name].shape)}, but config.json asks for {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ]
        problems += [
            f"{found[name].path}: {name}: is stored as {found[name].dtype}; moelab reads {', '.join(FLOATS)}: "
            "convert it, or use the checkpoint it was quantised from"
            for name in expected
            if name in found and found[name].dtype not in FLOATS
        ]
        if tied is None and HEAD in missing:
            problems.append(
                f"{self.folder}: missing: {HEAD}, though config.json has tie_word_embeddings false; set it to true if "
                "the embedding is the head, else download or write the checkpoint again"
            )
            missing.remove(HEAD)
        if missing:
            problems.append(f"{self.folder}: missing: {_some(missing)}; download or write the checkpoint again")
        fused = [name for name in unexpected if _FUSED.search(name)]
        if fused:
            problems.insert(0, self._fused(fused))
        elif unexpected:
            owner = found[unexpected[0]].path
            problems.append(
                f"{owner}: not part of the model of config.json: {_some(unexpected)}; is it another model's?"
            )
        if problems:
            more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise CheckpointError("\n".join([*problems[:SHOWN], *more]))
        if tied is not None:
            self._check_tied(*tied)

    def _fused(self, names: list[str]) -> str:
        return (
            f"{self.tensors[names[0]].path}: {_some(names)}: several matrices fused into one, in an order that this "
            "kind of model doesn't say; cut them into q_proj, k_proj and v_proj (gate_proj and up_proj) and store "
            "those, or add the kind as a plugin that says the rows (hook moelab_dense_sources)"
        )

    def _check_tied(self, head: str, embedding: str) -> None:
        """A stored head beside tie_word_embeddings must be the embedding: readers differ on which of the two wins."""
        if head in self.tensors and not self.same_bytes(head, embedding):
            raise CheckpointError(
                f"{self.tensors[head].path}: {head}: differs from {embedding}, though config.json has "
                "tie_word_embeddings true. transformers 4.x would use the embedding, 5.x this head, untied. Set "
                "tie_word_embeddings to false to use the head, or remove the tensor to use the embedding"
            )

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same values in the same format."""
        a, b = self.tensors[first], self.tensors[second]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        try:
            with open(a.path, "rb") as one, open(b.path, "rb") as other:
                for start in range(0, a.nbytes, _PIECE):
                    size = min(_PIECE, a.nbytes - start)
                    one.seek(a.offset + start)
                    other.seek(b.offset + start)
                    left, right = np.frombuffer(one.read(size), np.uint8), np.frombuffer(other.read(size), np.uint8)
                    if not np.array_equal(left, right):
                        return False
        except OSError as error:
            raise CheckpointError(f"{a.path}: can't be read: {error.strerror}") from error
        return True

    def read(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU."""
        stored = self.tensors[name]
        try:
            if stored.encoding:
                return _from_gguf(stored)
            if stored.scales is not None:
                return scaled(_whole(stored), _whole(stored.scales), stored.block)
            with safe_open(str(stored.path), framework="pt") as file:
                if stored.key and stored.shape:
                    part: Tensor = file.get_slice(stored.key)[stored.first : stored.first + stored.shape[0]]
                    return part
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{stored.path}: {name}: can't be read: {error}") from error

    def rename(self, parts: Callable[[str], list[tuple[str, int, int | None]]], paired: Mapping[str, int]) -> list[str]:
        """Look at the tensors under other names: a stored name -> (name, first row, rows or None for all) of each part.

        `paired`: the names whose rows lie in llama.cpp's order -> of how many heads. -> what has no part. Raises
        CheckpointError where a part reaches beyond its tensor.
        """
        found: dict[str, StoredTensor] = {}
        left_out = []
        for stored in self.tensors.values():
            places = parts(stored.name)
            if not places:
                left_out.append(stored.name)
            for name, first, rows in places:
                if name in found:
                    raise CheckpointError(f"{stored.path}: {stored.name}: '{name}' stands there twice; remove one")
                found[name] = _part(stored, name, first, rows, paired.get(name, 0))
        self.tensors = found
        return left_out


def _part(stored: StoredTensor, name: str, first: int, rows: int | None, paired_heads: int) -> StoredTensor:
    if name == stored.name and rows is None:
        return replace(stored, paired_heads=paired_heads) if paired_heads else stored
    if rows is None:
        return replace(stored, name=name, key=stored.name, paired_heads=paired_heads)
    if not stored.shape or first + rows > stored.shape[0]:
        raise CheckpointError(
            f"{stored.path}: {stored.name}: has shape {list(stored.shape)}, but rows {first} to {first + rows - 1} of "
            f"it are {name}: config.json is another model's"
        )
    row = stored.nbytes // stored.shape[0]
    return replace(
        stored, name=name, key=stored.name, first=first, shape=(rows, *stored.shape[1:]),
        offset=stored.offset + first * row, nbytes=rows * row, paired_heads=paired_heads,
    )  # fmt: skip


def _read_gguf(path: Path) -> dict[str, StoredTensor]:
    file = GGUFFile.of(path)
    file.types()
    return {
        name: StoredTensor(
            name=name,
            path=path,
            shape=tuple(int(size) for size in reversed(entry.shape)),
            dtype=TYPES[entry.tensor_type.name],
            offset=int(entry.data_offset),
            nbytes=int(entry.n_bytes),
            key=entry.name,
            encoding=entry.tensor_type.name,
        )
        for entry in file.entries
        if (name := file.names.get(entry.name)) is not None
    }


def _whole(stored: StoredTensor) -> Tensor:
    with safe_open(str(stored.path), framework="pt") as file:
        tensor: Tensor = file.get_tensor(stored.key or stored.name)
        return tensor


def scaled(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """weight [N, D] float8, scales [blocks, blocks] -> [N, D] fp32, which holds the products but for their last bit."""
    rows, columns = weight.shape
    wide = scales.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * wide


def _from_gguf(stored: StoredTensor) -> Tensor:
    """All of a tensor, decoded."""
    import torch  # noqa: PLC0415  (headers are read without it)

    raw = np.empty(stored.nbytes, np.uint8)
    rows = stored.shape[0] if stored.shape else 1
    with open(stored.path, "rb") as file:
        file.seek(stored.offset)
        count = file.readinto(raw.data)
    if count != stored.nbytes:
        raise CheckpointError(f"{stored.path}: became shorter while it was read; is it being written?")
    values = stored.decoded(raw.reshape(rows, -1), stored.paired_heads).reshape(stored.shape)
    if stored.dtype == "BF16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def refuse_two_readings(folder: Path) -> None:
    """Raises CheckpointError for a folder whose files alone leave open which weights are meant."""
    if (folder / SINGLE_FILE).exists() and (folder / INDEX_FILE).exists():
        raise CheckpointError(
            f"{folder}: holds both {SINGLE_FILE} and {INDEX_FILE}, of which one is left over; delete that one "
            f"(transformers reads {SINGLE_FILE})"
        )
    if (folder / ADAPTER_FILE).exists():
        raise CheckpointError(
            f"{folder}: holds {ADAPTER_FILE}, so that transformers adds an adapter to these weights where peft is "
            "installed; merge it into the weights (merge_and_unload), or move it away"
        )


def read_json(path: Path, missing: str = "a checkpoint folder needs it") -> dict[str, Any]:
    """A JSON object; CheckpointError naming the file otherwise. `missing`: what to say where there is none."""
    return read_object(path, READING if os.path.lexists(path) else Reading(CheckpointError, missing))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The library checks the header, and that the file has all the bytes it speaks of; we add where they lie."""
    header, begin, size = read_tensor_header(path, READING)
    try:
        with safe_open(str(path), framework="np"):
            pass
    except (OSError, SafetensorError, ValueError) as error:
        READING.refuse(path, f"is no whole safetensors file ({error}; {size} bytes): truncated or damaged", error)
    header.pop("__metadata__", None)
    entries = Record(str(path), header, READING).records()
    return {name: _stored(name, entry, path, begin) for name, entry in entries}


def _stored(name: str, entry: Record, path: Path, begin: int) -> StoredTensor:
    first, last = entry.listed("data_offsets", int, most=2)
    return StoredTensor(
        name=name,
        path=path,
        shape=tuple(entry.listed("shape", int)),
        dtype=entry.text("dtype"),
        offset=begin + first,
        nbytes=last - first,
    )


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not os.path.isfile(index.parent / shard)]  # no error for a long name
    if absent:
        raise CheckpointError(
            f"{index}: names {len(absent)} of {len(shards)} shards that are not there: {_some(absent)}; "
            "download or write them again"
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        header = read_header(index.parent / shard)
        named = {name for name, place in weight_map.items() if place == shard}
        for problem, names in (
            ("lacks", named - header.keys()),
            ("holds, unknown to the index,", header.keys() - named),
        ):
            if names:
                raise CheckpointError(
                    f"{index.parent / shard}: {problem} {_some(sorted(names))}; {INDEX_FILE} and the shards are of "
                    "different checkpoints: download or write both again"
                )
        tensors |= header
    return tensors


def _weight_map(index: Path) -> Mapping[str, str]:
    weight_map = Record(str(index), read_json(index), READING).record("weight_map").values
    if not weight_map:
        raise CheckpointError(f"{index}: weight_map: names no tensor; download or write it again")
    for name, shard in weight_map.items():
        # Only files of this folder: an index could otherwise point anywhere.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: weight_map.{name}: must name a .safetensors file beside it, not {shard!r}")
    return weight_map


def not_there(folder: Path) -> str:
    """What to say of a folder that is named as a Hugging Face checkpoint."""
    cure = f"; give a Hugging Face checkpoint: {A_CHECKPOINT}, or its name on the hub, such as Qwen/Qwen2-7B"
    return f"{folder}: no such folder{looked_in(folder)}{where_it_may_be(folder) or cure}"


def _nothing_to_read(folder: Path) -> str:
    if not folder.is_dir():
        return not_there(folder)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        return (
            f"{folder}: holds {_some(pickled)} but no .safetensors. moelab does not unpickle, since that runs code; "
            "convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; download or write the checkpoint again"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
