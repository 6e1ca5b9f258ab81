"""A Hugging Face folder -> a model: config first, then headers, then weights, and nothing left unloaded."""

from __future__ import annotations

from pathlib import Path

import torch

from moelab.builder import build_model
from moelab.errors import CheckpointError, ConfigError
from moelab.hf.checkpoint_folder import open_folder
from moelab.hf.files import TensorFolder
from moelab.hf.names import EMBEDDING, LM_HEAD, Piece, Shape, pieces
from moelab.nn.room import check_room
from moelab.nn.transformer import Transformer
from moelab.paths import user_path
from moelab.registry import Registry


def load_hf(
    folder: str | Path,
    registry: Registry | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The model of a folder, of any kind that hf/config.py reads, for evaluation, cast to `dtype` as `model.to` does.

    Raises CheckpointError naming file, tensor and cure, before any weight is read.
    """
    folder = user_path(folder)
    opened = open_folder(folder, registry)
    config, stored = opened.config, opened.stored
    try:
        model = build_model(config, registry, device="meta", seed=None)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: can't be built: {error}") from error
    wanted = _wanted(model, stored)
    stored.check(
        {piece.name: piece.shape(shape) for shape, found in wanted.values() for piece in found},
        tied=(LM_HEAD, EMBEDDING) if config.tie_word_embeddings else None,
    )
    check_room(model, device)
    if _unsaved_buffers(model):
        # Only the constructor knows their values, so it must run for real.
        model = build_model(config, registry, device=device, seed=None).to(dtype)
    else:
        model = model.to(dtype).to_empty(device=device)
        model.tie_weights()
    _fill(model, stored, wanted)
    return model.eval()


def _unsaved_buffers(model: Transformer) -> list[str]:
    """Names of buffers that no checkpoint holds; a plugin may have some."""
    saved = model.state_dict().keys()
    return [name for name, _ in model.named_buffers() if name not in saved]


def _wanted(model: Transformer, stored: TensorFolder) -> dict[str, tuple[Shape, list[Piece]]]:
    """Our name -> its shape and the stored tensors it is read from; experts apart or fused, as the folder has them."""
    wanted = {}
    for name, tensor in model.state_dict().items():
        if name == LM_HEAD and model.config.tie_word_embeddings:
            continue
        shape = tuple(tensor.shape)
        fused = pieces(name, shape, fused=True)
        wanted[name] = (shape, fused if all(p.name in stored.tensors for p in fused) else pieces(name, shape))
    return wanted


@torch.no_grad()
def _fill(model: Transformer, stored: TensorFolder, wanted: dict[str, tuple[Shape, list[Piece]]]) -> None:
    ours = model.state_dict()
    by_file = sorted(
        ((stored.tensors[piece.name].path, piece, name) for name, (_, found) in wanted.items() for piece in found),
        key=lambda entry: entry[0],
    )  # one file after the other: a disk reads that best
    for _, piece, name in by_file:
        piece.view(ours[name]).copy_(stored.read(piece.name))
