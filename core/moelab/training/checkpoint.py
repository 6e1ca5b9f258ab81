"""Writes a run's checkpoints, complete or absent, and goes on from one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelab.checkpoint import MODEL, TRAINING, load_model_tensors, model_tensors, read_state, stored_tensors
from moelab.errors import CheckpointError
from moelab.moe.balance import NamedLoss
from moelab.nn.pieces import first_of, held, is_piece, is_writer
from moelab.nn.transformer import Transformer
from moelab.parallel.ranks import ALONE, Ranks
from moelab.tensor_parts import Stored
from moelab.training.adapters import Adapters
from moelab.training.optimizer import optimizer_tensors, restore_optimizer
from moelab.training.writing import Held, Writing

HEAD = "head"  # of training.safetensors: what is trained beside the model


@dataclass(frozen=True)
class TrainingState:
    """All that resumes beside the model's own state_dict."""

    optimizer: torch.optim.Optimizer
    balance_losses: Sequence[NamedLoss]
    adapters: Adapters | None = None  # what the optimizer trains in place of the model's parameters
    head: nn.Module | None = None  # what it trains beside them: the model with one more head

    def learner(self, model: Transformer) -> nn.Module:
        """Where the optimizer's parameters are."""
        return self.adapters or self.head or model

    def head_tensors(self, model: Transformer) -> dict[str, Tensor]:
        """Parameters of the head that are not the model's."""
        if self.head is None:
            return {}
        own = {id(parameter) for parameter in model.parameters()}
        return {name: p for name, p in self.head.named_parameters() if id(p) not in own}


def save_checkpoint(
    folder: Path,
    model: Transformer,
    training: TrainingState,
    state: Mapping[str, Any],
    files: Mapping[str, bytes],
    ranks: Ranks = ALONE,
) -> None:
    """Write `folder` beside, its manifest last, sync it, rename it. `files`: config.yaml and the tokenizer's.

    All ranks call it; each writes what it holds, and any number of processes goes on from it, on any mesh. What goes
    wrong on one of them is raised on every rank.
    """
    writing = Writing(folder, own_tensors(model, training, ranks), state, files, ranks)
    writing.write()
    writing.finish()


def own_tensors(model: Transformer, training: TrainingState, ranks: Ranks = ALONE) -> dict[str, dict[str, Held]]:
    """{file: {tensor: what this rank writes of it}}; over all ranks every number comes once."""
    tensors = {MODEL: model_tensors(model), TRAINING: _training_tensors(model, training)}
    return {file: dict(_own(found, ranks)) for file, found in tensors.items()}


def _own(tensors: Mapping[str, Tensor], ranks: Ranks) -> Iterator[tuple[str, Held]]:
    """What all ranks hold alike the main one writes; what groups of them do, now one of them, now another."""
    for turn, (name, tensor) in enumerate(sorted(tensors.items())):
        if not is_piece(tensor):
            if ranks.main:
                yield name, Held(tensor)
            continue
        local = held(tensor)
        if not local.numel() or not is_writer(tensor, turn):
            continue
        if local.shape == tensor.shape:
            yield name, Held(local)
        else:
            assert local.shape[1:] == tensor.shape[1:], f"{name} is cut along another axis than the first"
            yield name, Held(local, (first_of(tensor)[0], tensor.shape[0]))


def restore_checkpoint(folder: Path, model: Transformer, training: TrainingState) -> dict[str, Any]:
    """Fill model, optimizer and balance losses from `folder`; -> what state.json says.

    Raises CheckpointError where tensors are missing, foreign or of another shape, before anything on disk is touched.
    """
    load_model_tensors(folder, model)
    path = folder / TRAINING
    tensors = stored_tensors(folder, TRAINING)
    moments = _below("optimizer", tensors)
    losses: dict[str, dict[str, Tensor]] = {named.name: {} for named in training.balance_losses if _state_dict(named)}
    heads = training.head_tensors(model)
    try:
        if training.adapters is not None:
            training.adapters.restore(_below("adapters", tensors))
        restore_optimizer(training.learner(model), training.optimizer, moments)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    for key in sorted(tensors):
        kind, _, rest = key.partition("/")
        if kind == "optimizer" or (kind == "adapters" and training.adapters is not None):
            continue
        if kind == HEAD and rest in heads and tensors[key].shape == heads[rest].shape:
            with torch.no_grad():
                heads.pop(rest).copy_(tensors[key].read())
            continue
        name, _, part = rest.partition("/")
        if kind != "balance_losses" or name not in losses:
            raise CheckpointError(f"{path}: holds '{key}', which nothing of this run keeps; use an earlier checkpoint")
        losses[name][part] = tensors[key].read()
    if heads:
        raise CheckpointError(f"{path}: lacks {HEAD}/{min(heads)}; use an earlier checkpoint, or restore it")
    for named in training.balance_losses:
        if named.name in losses:
            _restore_loss(named, losses[named.name], path)
    return read_state(folder)


def _below(kind: str, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    return {key.removeprefix(f"{kind}/"): value for key, value in tensors.items() if key.startswith(f"{kind}/")}


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
    moments = optimizer_tensors(training.learner(model), training.optimizer)
    tensors = {f"optimizer/{key}": value for key, value in moments.items()}
    tensors |= {f"{HEAD}/{key}": value for key, value in training.head_tensors(model).items()}
    if training.adapters is not None:
        tensors |= {f"adapters/{key}": value for key, value in training.adapters.tensors().items()}
    for named in training.balance_losses:
        tensors |= {f"balance_losses/{named.name}/{key}": value for key, value in _state_dict(named).items()}
    return {name: t.detach() if is_piece(t) else t.detach().contiguous() for name, t in tensors.items()}
