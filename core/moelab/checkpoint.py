"""Checkpoints of moelab's own: safetensors and JSON, complete or absent, never pickled.

checkpoints/step_00000100/ holds model.safetensors (parameters and plugin buffers under the model's names),
training.safetensors (optimizer moments, state of the balance losses), state.json, config.yaml and the tokenizer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelab.builder import build_model
from moelab.config.load import to_schema
from moelab.config.run import RunConfig
from moelab.errors import CheckpointError, ConfigError
from moelab.hf.load import load_hf
from moelab.moe.balance import NamedLoss
from moelab.nn.transformer import Transformer
from moelab.registry import Registry
from moelab.train.optimizer import optimizer_tensors, restore_optimizer
from moelab.train.run_folder import CHECKPOINTS, CONFIG

MODEL, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"


@dataclass(frozen=True)
class TrainingState:
    """All that resumes beside the model's own state_dict."""

    optimizer: torch.optim.Optimizer
    balance_losses: Sequence[NamedLoss]


def save_checkpoint(
    folder: Path, model: Transformer, training: TrainingState, state: Mapping[str, Any], files: Mapping[str, bytes]
) -> None:
    """Write `folder` beside, sync it, rename it. `files`: config.yaml and the tokenizer's."""
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        save_file(_model_tensors(model), beside / MODEL)
        save_file(_training_tensors(model, training), beside / TRAINING)
        (beside / STATE).write_text(json.dumps(dict(state), indent=2) + "\n")
        for name, content in files.items():
            (beside / name).write_bytes(content)
        for path in (*beside.iterdir(), beside):
            _sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(
            f"{folder}: can't be written: {error}; free some space and go on with --resume"
        ) from error


def restore_checkpoint(folder: Path, model: Transformer, training: TrainingState) -> dict[str, Any]:
    """Fill model, optimizer and balance losses from `folder`; -> what state.json says."""
    load_model_tensors(folder, model)
    tensors = _read(folder / TRAINING)
    device = next(model.parameters()).device
    moments = {
        key.removeprefix("optimizer/"): v.to(device) for key, v in tensors.items() if key.startswith("optimizer/")
    }
    restore_optimizer(model, training.optimizer, moments)
    for named in training.balance_losses:
        own = f"balance_losses/{named.name}/"
        state = {key.removeprefix(own): value for key, value in tensors.items() if key.startswith(own)}
        if state:
            named.loss.load_state_dict(state)  # type: ignore[attr-defined]
    return read_state(folder)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder / STATE}: can't be read ({error}); use an earlier checkpoint") from error
    assert isinstance(state, dict)
    return state


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The last complete checkpoint of a run folder: a partial one has another name."""
    return max(checkpoints(run_dir), default=None)


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    return sorted(path for path in (run_dir / CHECKPOINTS).glob("step_*") if (path / STATE).is_file())


def load_model(path: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Transformer:
    """A model from a run folder (its newest checkpoint), a moelab checkpoint, or a Hugging Face folder."""
    folder = resolve_checkpoint(path)
    if not is_moelab(folder):
        return load_hf(folder, dtype=dtype, device=device)
    config = read_run_config(folder)
    registry = Registry(config.plugins, config.entry_points, [Path(p) for p in config.search_path])
    model = build_model(config.model, registry, device=device, seed=None)
    load_model_tensors(folder, model)
    return model.to(dtype)


def resolve_checkpoint(path: Path) -> Path:
    """The folder that holds the weights. Raises CheckpointError when there is none."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run folder, a checkpoint, or a Hugging Face folder")
    if (path / CHECKPOINTS).is_dir():
        newest = newest_checkpoint(path)
        if newest is None:
            raise CheckpointError(f"{path}: this run has no complete checkpoint")
        return newest
    if not is_moelab(path) and not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: holds no checkpoint: neither {STATE} (moelab) nor config.json (Hugging Face)")
    return path


def is_moelab(folder: Path) -> bool:
    return (folder / STATE).is_file() and (folder / CONFIG).is_file()


def read_run_config(folder: Path) -> RunConfig:
    """The resolved config of a run folder or checkpoint."""
    from omegaconf import OmegaConf  # noqa: PLC0415  (yaml only matters here)

    try:
        tree = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
        assert isinstance(tree, dict)
        return to_schema({str(key): value for key, value in tree.items()}, RunConfig)
    except (OSError, ConfigError) as error:
        raise CheckpointError(f"{folder / CONFIG}: can't be read: {error}") from error


def load_model_tensors(folder: Path, model: Transformer) -> None:
    """Fill the model from model.safetensors; every tensor must be there, fit, and be asked for."""
    found = _read(folder / MODEL)
    wanted = _model_tensors(model)
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    misfits = [name for name in wanted.keys() & found.keys() if wanted[name].shape != found[name].shape]
    if missing or unexpected or misfits:
        raise CheckpointError(
            f"{folder / MODEL}: does not fit the model of its config: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}, of another shape {misfits[:3]}"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


def _model_tensors(model: Transformer) -> dict[str, Tensor]:
    """The state_dict, each tied tensor once."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _training_tensors(model: Transformer, training: TrainingState) -> dict[str, Tensor]:
    tensors = {f"optimizer/{key}": value for key, value in optimizer_tensors(model, training.optimizer).items()}
    for named in training.balance_losses:
        state_dict = getattr(named.loss, "state_dict", dict)
        tensors |= {f"balance_losses/{named.name}/{key}": value for key, value in state_dict().items()}
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing; the checkpoint is not complete, use an earlier one") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: can't be read ({error}); it is cut short or damaged, use an earlier one"
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
