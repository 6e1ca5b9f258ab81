"""Writes a run's checkpoints, complete or absent, and goes on from one."""

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
from safetensors.torch import save_file
from torch import Tensor

from moelab.checkpoint import MODEL, STATE, TRAINING, load_model_tensors, model_tensors, read_state, read_tensors
from moelab.errors import CheckpointError
from moelab.moe.balance import NamedLoss
from moelab.nn.transformer import Transformer
from moelab.train.optimizer import optimizer_tensors, restore_optimizer


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
        save_file(model_tensors(model), beside / MODEL)
        save_file(_training_tensors(model, training), beside / TRAINING)
        (beside / STATE).write_text(json.dumps(dict(state), indent=2) + "\n")
        for name, content in files.items():
            (beside / name).write_bytes(content)
        for name in (MODEL, TRAINING):
            shutil.copymode(beside / STATE, beside / name)  # the library's 0600 would shut out whoever else reads it
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
    tensors = read_tensors(folder / TRAINING)
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


def _training_tensors(model: Transformer, training: TrainingState) -> dict[str, Tensor]:
    tensors = {f"optimizer/{key}": value for key, value in optimizer_tensors(model, training.optimizer).items()}
    for named in training.balance_losses:
        state_dict = getattr(named.loss, "state_dict", dict)
        tensors |= {f"balance_losses/{named.name}/{key}": value for key, value in state_dict().items()}
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
