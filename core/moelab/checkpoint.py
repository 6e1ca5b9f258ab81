"""Checkpoints of moelab's own as they lie on disk: where they are, under which config they were written, their tensors.

checkpoints/step_00000100/ holds model.safetensors (parameters and plugin buffers under the model's names),
training.safetensors (optimizer moments, state of the balance losses), state.json, config.yaml, the tokenizer, and
manifest.json with the checksums of all of them. Safetensors and JSON, complete or absent, never pickled. What writes
them is training/checkpoint.py, what compares them with their checksums integrity.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moelab.atomic import where_it_may_be
from moelab.config.run import RunConfig
from moelab.config.stored import read_stored
from moelab.errors import CheckpointError, ConfigError
from moelab.nn.pieces import fill, is_piece
from moelab.nn.transformer import Transformer
from moelab.safe_files import Reading, read_object, read_tensor_header

Shape = tuple[int, ...]
READING = Reading(CheckpointError, "the checkpoint is damaged or not complete: use an earlier one")
CHECKPOINTS = "checkpoints"  # of a run folder
BEST = "best"  # of a run folder with train.keep_best: the checkpoint of the lowest held-out loss
MODEL, TRAINING, STATE, CONFIG = "model.safetensors", "training.safetensors", "state.json", "config.yaml"


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The last checkpoint of a run folder, damaged or not."""
    return max(checkpoints(run_dir), default=None)


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first. They were written whole: a partial one has another name."""
    return sorted(path for path in (run_dir / CHECKPOINTS).glob("step_*") if path.is_dir())


def resolve_checkpoint(path: Path) -> Path:
    """The folder that holds the weights. Raises CheckpointError when there is none."""
    if path.suffix.lower() == ".gguf" and path.is_file():
        raise CheckpointError(
            f"{path}: a GGUF file is read by `moelab upcycle`, and by `moelab export {path} FOLDER`, which makes a "
            "Hugging Face folder of it for everything else"
        )
    if not path.is_dir():
        hint = where_it_may_be(path) or "; give a run folder, a checkpoint, or a Hugging Face folder"
        raise CheckpointError(f"{path}: no such folder{hint}")
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
        raise CheckpointError(f"{path}: holds no checkpoint: neither {STATE} (moelab) nor config.json (Hugging Face)")
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


def load_model_tensors(folder: Path, model: Transformer) -> None:
    """Fill the model from model.safetensors; every tensor must be there, fit, and be asked for."""
    found = read_tensors(folder / MODEL)
    wanted = model_tensors(model)
    refuse_misfits(folder / MODEL, *({name: tuple(t.shape) for name, t in side.items()} for side in (found, wanted)))
    for name, tensor in wanted.items():
        fill(tensor, found[name])


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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a safetensors file. Raises CheckpointError when it is missing or damaged."""
    read_tensor_header(path, READING)  # before all of it is mapped
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: can't be read ({error}); it is cut short or damaged, use an earlier one"
        ) from error
