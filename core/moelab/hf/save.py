"""A model -> a Hugging Face folder that transformers 4.57 and 5.x load, written whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelab.atomic import check_place, lock_beside, partial, put_in_place, recover, sync
from moelab.errors import CheckpointError
from moelab.hf.carried import GENERATION_FILE, ID_FIELDS
from moelab.hf.config import CONFIG_FILE
from moelab.hf.files import INDEX_FILE, SINGLE_FILE
from moelab.hf.moe_formats import MOE_FORMATS
from moelab.hf.names import LM_HEAD, Piece, pieces
from moelab.hf.write_config import write_config
from moelab.lock import FileLock, hold_file
from moelab.nn.transformer import Transformer
from moelab.paths import user_path
from moelab.stored_weights import StoredWeights
from moelab.tensor_file import write_tensors

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Written:
    """A tensor to write: a piece of the parameter of this name."""

    piece: Piece
    name: str
    parameter: Tensor


def save_hf(
    model: Transformer,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
    extra_files: Mapping[str, bytes] | None = None,
    config_extra: Mapping[str, Any] | None = None,
    force: bool = False,
    weights: StoredWeights | None = None,
    closing: Callable[[], Mapping[str, bytes]] = dict,
) -> None:
    """Write config.json, the weights in `dtype`, and `extra_files` (a tokenizer, say) as a new folder.

    A generation_config.json among `extra_files` is kept; else one is made of the token ids in `config_extra`. Experts
    are written apart, as every client reads them; a tied head is left out. `force` replaces an existing
    checkpoint. `weights`: from where each tensor is read when it is written, so that `model` may be on the meta device
    and what it takes is a file and one tensor. `closing`: more files, asked for once all tensors are written. Raises
    CheckpointError if the format can't hold the model, or the folder is in the way.
    """
    config = write_config(model, dtype=dtype, extra=config_extra)
    shards = _shards(_tensors(model, str(config["model_type"])), dtype.itemsize, parse_size(max_shard_size))
    with new_folder(user_path(folder), force=force) as (temporary, lock):
        _write_json(temporary / CONFIG_FILE, config)
        ids = {key: config[key] for key in ID_FIELDS if config.get(key) is not None}
        if ids and GENERATION_FILE not in (extra_files or {}):
            _write_json(temporary / GENERATION_FILE, {"_from_model_config": True, **ids})
        _write_shards(temporary, shards, dtype, lock, weights)
        for name, content in {**(extra_files or {}), **closing()}.items():
            path = temporary / name
            if path.parent != temporary or path.exists():
                raise ValueError(f"extra_files: '{name}' is not the name of one more file")
            path.write_bytes(content)


def parse_size(size: int | str) -> int:
    """Bytes of 5000000000, "5GB" or "4.5GiB"; as Hugging Face counts, GB is 10^9 and GiB 2^30."""
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?I?B)?\s*", str(size).upper())
    unit = _UNITS.get(found[2] or "B") if found else None
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise CheckpointError(f"max_shard_size: '{size}' is no size; write 5GB, 500MB or a number of bytes")
    return int(float(found[1]) * unit)


@contextmanager
def new_folder(target: Path, *, force: bool = False) -> Iterator[tuple[Path, FileLock]]:
    """A temporary folder that becomes `target` when the block ends well, synced, and vanishes when it does not.

    What a killed writer of the same `target` left is removed first, and told. Raises CheckpointError if `target` is a
    file, or holds something and `force` is not given; UserError while another process writes it. A block that takes
    minutes beats the lock.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: is a file; choose another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with hold_file(lock_beside(target), what=f"{target}:", otherwise="choose another folder") as lock:
            recover(target)
            _check_held(target, force)
            with _temporary(partial(target)) as temporary:
                yield temporary, lock
                for path in [*temporary.iterdir(), temporary]:
                    sync(path)
                put_in_place(temporary, target)
    except OSError as error:
        raise CheckpointError(
            f"{target}: can't be written: {error.strerror or error}; nothing was kept; free some space, or choose "
            "another folder"
        ) from error


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_target(target: Path, *, force: bool = False) -> None:
    """Before the work: raises UserError where `new_folder` could not make it, CheckpointError for what lies there."""
    check_place(target.resolve(), fresh=False)  # a link is followed, as there
    _check_held(target, force)


def _check_held(target: Path, force: bool) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not force:
        raise CheckpointError(
            f"{target}: exists and is not empty; choose another folder, or move it away (`moelab export` has --force)"
        )
    if not (target / CONFIG_FILE).is_file():
        raise CheckpointError(f"{target}: holds no {CONFIG_FILE}, so it is no checkpoint, and --force won't delete it")


def _tensors(model: Transformer, model_type: str) -> list[Written]:
    """Every tensor to write, in the model's order."""
    found = []
    stored_name = MOE_FORMATS[model_type].stored_name if model_type in MOE_FORMATS else str
    for name, parameter in model.state_dict().items():
        if name == LM_HEAD and model.config.tie_word_embeddings:
            continue
        found += [
            Written(piece.called(stored_name(piece.name)), name, parameter)
            for piece in pieces(name, tuple(parameter.shape))
        ]
    return found


def _shards(tensors: list[Written], itemsize: int, limit: int) -> list[list[Written]]:
    """Cut the list so that no shard exceeds `limit` bytes, a single larger tensor excepted."""
    shards: list[list[Written]] = [[]]
    filled = 0
    for written in tensors:
        size = written.piece.view(written.parameter).numel() * itemsize
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(written)
        filled += size
    return shards


def _write_shards(
    folder: Path, shards: list[list[Written]], dtype: torch.dtype, lock: FileLock, weights: StoredWeights | None
) -> None:
    """One shard's copy is in memory at a time, and of what is read one parameter."""
    source = _Source(weights)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        lock.beat()
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {w.piece.name: _copy(w.piece.view(source.values(w)), dtype) for w in shard}
        write_tensors(folder / name, tensors, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / INDEX_FILE, index)


class _Source:
    """The parameters' values: their own, or read; of those read the last is kept, for the next piece is of it too."""

    def __init__(self, weights: StoredWeights | None) -> None:
        self._weights = weights
        self._name = ""
        self._read = torch.empty(0)

    def values(self, written: Written) -> Tensor:
        if self._weights is None:
            return written.parameter
        if self._name != written.name:
            self._read = torch.empty(0)  # before the next one is there
            self._read = torch.empty(written.parameter.shape, dtype=written.parameter.dtype)
            self._weights.read_into(written.name, self._read)
            self._name = written.name
        return self._read


def _copy(view: Tensor, dtype: torch.dtype) -> Tensor:
    """A view of a bank must not be written with its neighbours, nor in its strides."""
    return torch.empty(view.shape, dtype=dtype).copy_(view.detach())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
