"""Reads a folder of safetensors: headers first, everything checked, and only then any weights. Never unpickles."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moelab.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "BF16", "F16")
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class StoredTensor:
    """One header entry."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32, BF16, ...


class TensorFolder:
    """The tensors of a checkpoint folder, by name. Opening it reads every header and no weights."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for absent, truncated or garbled files, and an index that does not fit them."""
        self.folder = folder
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if single.exists() and index.exists():
            raise CheckpointError(
                f"{folder}: holds both {SINGLE_FILE} and {INDEX_FILE}, of which one is left over; delete that one "
                f"(transformers reads {SINGLE_FILE})"
            )
        if single.exists():
            self.tensors = _read_header(single)
        elif index.exists():
            self.tensors = _read_shards(index)
        else:
            raise CheckpointError(_nothing_to_read(folder))

    def check(self, expected: Mapping[str, tuple[int, ...]], optional: Iterable[str] = ()) -> None:
        """Exactly these tensors, of these shapes, in floating point; `optional` ones may be there besides."""
        found = self.tensors
        missing = [name for name in expected if name not in found]
        unexpected = sorted(found.keys() - expected.keys() - set(optional))
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
        if missing:
            problems.append(f"{self.folder}: missing: {_some(missing)}; download or write the checkpoint again")
        if unexpected:
            owner = found[unexpected[0]].path
            problems.append(
                f"{owner}: not part of the model of config.json: {_some(unexpected)}; is it another model's?"
            )
        if problems:
            more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise CheckpointError("\n".join([*problems[:SHOWN], *more]))

    def read(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU."""
        path = self.tensors[name].path
        try:
            with safe_open(str(path), framework="pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {name}: can't be read: {error}") from error


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(str(path), framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            return {name: StoredTensor(path, tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is no whole safetensors file ({error}; {_size(path)}): truncated or damaged; "
            "download or write it again"
        ) from error


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise CheckpointError(
            f"{index}: names {len(absent)} of {len(shards)} shards that are not there: {_some(absent)}; "
            "download or write them again"
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        header = _read_header(index.parent / shard)
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


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{index}: can't be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{index}: is not JSON ({error}); download or write it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: must be an object, tensor name -> file, not {weight_map!r}")
    for name, shard in weight_map.items():
        # Only files of this folder: an index could otherwise point anywhere.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: weight_map.{name}: must name a .safetensors file beside it, not {shard!r}")
    return weight_map


def _nothing_to_read(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder"
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        return (
            f"{folder}: holds {_some(pickled)} but no .safetensors. moelab does not unpickle, since that runs code; "
            "convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; download or write the checkpoint again"


def _size(path: Path) -> str:
    try:
        return f"{path.stat().st_size} bytes"
    except OSError:
        return "size unknown"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
