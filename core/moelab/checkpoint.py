"""Checkpoints of moelab's own as they lie on disk: where they are, under which config they were written, their tensors.

checkpoints/step_00000100/ holds model.safetensors (parameters and plugin buffers under the model's names),
training.safetensors (optimizer moments, state of the balance losses), state.json, config.yaml, the tokenizer, and
manifest.json with the checksums of all of them. Several processes write a file each, model-00001-of-00004.safetensors
and so on, of the rows that they hold; which rows, the manifest says. Safetensors and JSON, complete or absent, never
pickled. What writes them is training/checkpoint.py, what compares them with their checksums integrity.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moelab.atomic import where_it_may_be
from moelab.config.run import RunConfig
from moelab.config.stored import read_stored
from moelab.errors import CheckpointError, ConfigError
from moelab.hf.files import read_header
from moelab.hf.gguf_file import gguf_of
from moelab.manifest import MANIFEST, read_manifest
from moelab.nn.pieces import fill_from, is_piece
from moelab.nn.transformer import Transformer
from moelab.paths import looked_in
from moelab.printable import printable
from moelab.safe_files import Reading, read_object
from moelab.stored_weights import fill
from moelab.tensor_parts import Part, Shape, Stored

READING = Reading(CheckpointError, "the checkpoint is damaged or not complete: use an earlier one")
CHECKPOINTS = "checkpoints"  # of a run folder
BEST = "best"  # of a run folder with train.keep_best: the checkpoint of the lowest held-out loss
MODEL, TRAINING, STATE, CONFIG = "model.safetensors", "training.safetensors", "state.json", "config.yaml"

# What torch writes, its distributed checkpoint among it: it runs code when it is loaded, so it isn't.
PICKLES = (".distcp", ".metadata", ".pt", ".pth", ".bin", ".ckpt")


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The last checkpoint of a run folder, damaged or not."""
    return max(checkpoints(run_dir), default=None)


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first. They were written whole: a partial one has another name."""
    return sorted(path for path in (run_dir / CHECKPOINTS).glob("step_*") if path.is_dir())


def resolve_checkpoint(path: Path) -> Path:
    """The folder that holds the weights. Raises CheckpointError when there is none."""
    if gguf_of(path) is not None:  # a file, or a folder of one
        return path
    if not path.is_dir():
        what = "; give a run folder, a checkpoint, a Hugging Face folder, or hf://ORG/NAME of the hub"
        hint = where_it_may_be(path) or what
        raise CheckpointError(f"{path}: no such folder{looked_in(path)}{hint}")
    if (path / CHECKPOINTS).is_dir():
        newest = newest_checkpoint(path)
        if newest is None:
            raise CheckpointError(f"{path}: this run has no checkpoint")
        for name in (STATE, CONFIG):
            if not (newest / name).is_file():
                raise CheckpointError(f"{newest / name}: is missing; use an earlier checkpoint, or restore it")
        return newest
    if is_moelab(path) and (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: holds both {STATE} (moelab) and config.json (Hugging Face), one of them left over; remove it"
        )
    if not is_moelab(path) and not (path / "config.json").is_file():
        pickles = sorted(item.name for item in path.iterdir() if item.name.endswith(PICKLES))
        there = f"; {', '.join(pickles[:3])} there is not opened: a pickle runs code" if pickles else ""
        raise CheckpointError(
            f"{path}: holds no checkpoint: neither {STATE} (moelab) nor config.json (Hugging Face){printable(there)}"
        )
    return path


def is_moelab(folder: Path) -> bool:
    """Whether it is a complete checkpoint of moelab's own."""
    return (folder / STATE).is_file() and (folder / CONFIG).is_file()


def read_run_config(folder: Path) -> RunConfig:
    """The resolved config of a run folder or checkpoint: data, in which nothing is looked up."""
    try:
        return read_stored(folder / CONFIG, RunConfig)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: can't be read: {error}") from error


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json says: step, tokens, fingerprints. Raises CheckpointError when it can't be read."""
    return read_object(folder / STATE, READING, finite=False)


class OwnWeights:
    """The weights of a checkpoint, of one file or of those of several processes; opening it reads headers alone."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError where a file is missing or damaged."""
        self.path = folder / MODEL
        found = stored_tensors(folder, MODEL)
        order = sorted(found, key=lambda name: (found[name].parts[0].path, found[name].parts[0].offset))
        self.stored = {name: found[name] for name in order}
        self.shapes: dict[str, Shape] = {name: stored.shape for name, stored in self.stored.items()}

    def check(self, model: Transformer) -> None:
        """Every tensor must be there, fit, and be asked for. Raises CheckpointError where one doesn't."""
        refuse_misfits(self.path, self.shapes, {name: tuple(t.shape) for name, t in model_tensors(model).items()})

    def read_into(self, name: str, tensor: Tensor) -> None:
        """Set it to the stored values; of one that lies in pieces, this process's own."""
        fill_from(tensor, self.stored[name])


def load_model_tensors(folder: Path, model: Transformer) -> None:
    """Fill the model, or what of it this process holds, tensor by tensor."""
    stored = OwnWeights(folder)
    stored.check(model)
    fill(model, stored)


def refuse_misfits(path: Path, found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    """Raises CheckpointError where a file has other tensors than the model of its config, or of other shapes."""
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    misfits = [name for name in wanted.keys() & found.keys() if wanted[name] != found[name]]
    if missing or unexpected or misfits:
        raise CheckpointError(
            f"{path}: does not fit the model of its config: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}, of another shape {misfits[:3]}"
        )


def model_tensors(model: Transformer) -> dict[str, Tensor]:
    """The state_dict, each tied tensor once."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return {name: t.detach() if is_piece(t) else t.detach().contiguous() for name, t in tensors.items()}


def shard_name(name: str, rank: int, world: int) -> str:
    """model.safetensors -> what rank 0 of 4 writes of it, model-00001-of-00004.safetensors; alone the name itself."""
    stem, _, kind = name.partition(".")
    return name if world == 1 else f"{stem}-{rank + 1:05d}-of-{world:05d}.{kind}"


def tensor_files(name: str, listed: Collection[str]) -> list[str]:
    """The files that `name` is made of: itself, or one of each process that wrote it.

    `listed`: what a manifest names. Raises CheckpointError naming one that is missing there.
    """
    if name in listed:
        return [name]
    stem, _, kind = name.partition(".")
    pattern = re.compile(rf"{stem}-\d{{5}}-of-(\d{{5}})\.{kind}")
    worlds = {int(found[1]) for found in map(pattern.fullmatch, listed) if found is not None}
    for world in worlds:
        files = [shard_name(name, rank, world) for rank in range(world)]
        if len(worlds) == 1 and world > 1 and set(files) <= set(listed):
            return files
    missing = [shard_name(name, rank, world) for world in worlds for rank in range(world)] or [name]
    missing = [file for file in missing if file not in listed] or missing
    raise CheckpointError(f"{MANIFEST}: lists no {missing[0]}")


def stored_tensors(folder: Path, name: str) -> dict[str, Stored]:
    """The tensors of model.safetensors or training.safetensors, or of the files of several processes.

    Headers are read, no weights. Raises CheckpointError naming the file that is missing or damaged, and a tensor of
    which rows are missing or twice there.
    """
    manifest = read_manifest(folder)
    if manifest is None:  # as one process of an earlier version wrote it
        return {tensor: Stored(part.shape, (part,)) for tensor, part in _parts(folder / name)}
    try:
        files = tensor_files(name, manifest.files.keys())
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/{error}; {READING.cure}") from error
    found: dict[str, list[Part]] = {}
    counts: dict[str, int] = {}
    for file in files:
        rows = {part.name: part.rows for part in manifest.files[file] if part.rows is not None}
        for tensor, part in _parts(folder / file, rows):
            found.setdefault(tensor, []).append(part)
            counts.setdefault(tensor, rows[tensor][1] if tensor in rows else -1)
    return {tensor: _whole(folder, tensor, parts, counts[tensor]) for tensor, parts in found.items()}


def _parts(path: Path, rows: Mapping[str, tuple[int, int]] | None = None) -> Iterator[tuple[str, Part]]:
    for name, stored in read_header(path).items():
        first = (rows or {}).get(name, (0, 0))[0]
        index = (slice(first, first + stored.shape[0]),) if rows and name in rows and stored.shape else ()
        yield name, Part(path, name, stored.offset, stored.dtype, stored.shape, index)


def _whole(folder: Path, name: str, parts: list[Part], rows: int) -> Stored:
    """rows: of the whole; -1 where it lies in one file."""
    if rows < 0 and len(parts) == 1:
        return Stored(parts[0].shape, tuple(parts))
    parts = sorted(parts, key=_first_row)
    end = 0
    for part in parts:
        if not part.index or _first_row(part) != end or part.shape[1:] != parts[0].shape[1:]:
            break
        end += part.shape[0]
    if end != rows or len({part.dtype for part in parts}) > 1:
        files = ", ".join(sorted({part.path.name for part in parts}))
        raise CheckpointError(f"{folder}: {name}: {files} do not hold each of its rows once; {READING.cure}")
    return Stored((rows, *parts[0].shape[1:]), tuple(parts))


def _first_row(part: Part) -> int:
    at = part.index[0] if part.index else 0
    return int(at.start) if isinstance(at, slice) else at
