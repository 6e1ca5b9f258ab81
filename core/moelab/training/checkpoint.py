"""Writes a run's checkpoints, complete or absent, and goes on from one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelab.atomic import partial, put_in_place, sync
from moelab.checkpoint import MODEL, STATE, TRAINING, load_model_tensors, model_tensors, read_state, stored_tensors
from moelab.errors import CheckpointError
from moelab.manifest import MANIFEST, manifest_bytes, plain_entry
from moelab.moe.balance import NamedLoss
from moelab.nn.pieces import is_piece, whole
from moelab.nn.transformer import Transformer
from moelab.parallel.ranks import ALONE, Ranks
from moelab.tensor_file import write_tensors
from moelab.training.limits import check_disk
from moelab.training.optimizer import optimizer_tensors, restore_optimizer


@dataclass(frozen=True)
class TrainingState:
    """All that resumes beside the model's own state_dict."""

    optimizer: torch.optim.Optimizer
    balance_losses: Sequence[NamedLoss]


def save_checkpoint(
    folder: Path,
    model: Transformer,
    training: TrainingState,
    state: Mapping[str, Any],
    files: Mapping[str, bytes],
    ranks: Ranks = ALONE,
) -> None:
    """Write `folder` beside, its manifest last, sync it, rename it. `files`: config.yaml and the tokenizer's.

    All ranks call it; the main one gathers in its memory what lies in pieces, and writes. So a checkpoint is the same
    whatever the mesh, and any number of processes goes on from it. What goes wrong there is raised on every rank.
    """
    weights = _gathered(model_tensors(model), ranks)
    moments = _gathered(_training_tensors(model, training), ranks)
    error: CheckpointError | None = None
    if ranks.main:
        try:
            _write(folder, weights, moments, state, files)
        except CheckpointError as problem:
            error = problem
    told = ranks.first(None if error is None else str(error))
    if error is not None:
        raise error
    if told is not None:
        raise CheckpointError(told)


def _gathered(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Whole tensors, in the main process alone; one after the other, so that the others hold one at a time."""
    if ranks.size == 1:
        return dict(tensors)
    found = {}
    for name in sorted(tensors):
        full = whole(tensors[name])
        if ranks.main:
            found[name] = full.cpu()
    return found


def _write(
    folder: Path,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    state: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> None:
    check_disk(folder, {MODEL: _bytes(weights), TRAINING: _bytes(moments)})
    beside = partial(folder)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    small = {STATE: (json.dumps({**state, "manifest": MANIFEST}, indent=2) + "\n").encode(), **files}
    try:
        entries = {name: plain_entry(content) for name, content in small.items()}
        entries[MODEL] = write_tensors(beside / MODEL, weights).entry()
        entries[TRAINING] = write_tensors(beside / TRAINING, moments).entry()
        for name, content in {**small, MANIFEST: manifest_bytes(entries)}.items():
            (beside / name).write_bytes(content)
        for path in (*beside.iterdir(), beside):
            sync(path)
        put_in_place(beside, folder)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(
            f"{folder}: can't be written: {error}; free some space and go on with --resume"
        ) from error


def restore_checkpoint(folder: Path, model: Transformer, training: TrainingState) -> dict[str, Any]:
    """Fill model, optimizer and balance losses from `folder`; -> what state.json says.

    Raises CheckpointError where tensors are missing, foreign or of another shape, before anything on disk is touched.
    """
    load_model_tensors(folder, model)
    path = folder / TRAINING
    tensors = stored_tensors(folder, TRAINING)
    moments = {key.removeprefix("optimizer/"): v for key, v in tensors.items() if key.startswith("optimizer/")}
    losses: dict[str, dict[str, Tensor]] = {named.name: {} for named in training.balance_losses if _state_dict(named)}
    try:
        restore_optimizer(model, training.optimizer, moments)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    for key in sorted(tensors.keys() - {f"optimizer/{key}" for key in moments}):
        kind, _, rest = key.partition("/")
        name, _, part = rest.partition("/")
        if kind != "balance_losses" or name not in losses:
            raise CheckpointError(f"{path}: holds '{key}', which nothing of this run keeps; use an earlier checkpoint")
        losses[name][part] = tensors[key].read()
    for named in training.balance_losses:
        if named.name in losses:
            _restore_loss(named, losses[named.name], path)
    return read_state(folder)


def _restore_loss(named: NamedLoss, state: dict[str, Tensor], path: Path) -> None:
    if missing := sorted(_state_dict(named).keys() - state.keys()):
        raise CheckpointError(
            f"{path}: lacks balance_losses/{named.name}/{missing[0]}, which the balance loss goes on from; use an "
            "earlier checkpoint, or restore it"
        )
    try:
        named.loss.load_state_dict(state)  # type: ignore[attr-defined]
    except (KeyError, ValueError, TypeError, RuntimeError) as error:  # whatever its plugin makes of it
        raise CheckpointError(
            f"{path}: balance loss '{named.name}' can't go on from its state there ({type(error).__name__}: {error}); "
            "use an earlier checkpoint, or restore it"
        ) from error


def _state_dict(named: NamedLoss) -> Mapping[str, Tensor]:
    """What a balance loss carries from step to step; most carry nothing."""
    found: Mapping[str, Tensor] = getattr(named.loss, "state_dict", dict)()
    return found


def _training_tensors(model: Transformer, training: TrainingState) -> dict[str, Tensor]:
    tensors = {f"optimizer/{key}": value for key, value in optimizer_tensors(model, training.optimizer).items()}
    for named in training.balance_losses:
        tensors |= {f"balance_losses/{named.name}/{key}": value for key, value in _state_dict(named).items()}
    return {name: t.detach() if is_piece(t) else t.detach().contiguous() for name, t in tensors.items()}


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
