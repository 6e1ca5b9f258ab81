"""A Hugging Face folder -> a model: config first, then headers, then weights, and nothing left unloaded."""

from __future__ import annotations

from pathlib import Path

import torch

from moelab.builder import build_model
from moelab.errors import CheckpointError, ConfigError
from moelab.hf.config import read_config
from moelab.hf.files import TensorFolder
from moelab.hf.names import EMBEDDING, LM_HEAD, Piece, Shape, pieces
from moelab.hf.sizes import check_sizes
from moelab.nn.pieces import fill_from
from moelab.nn.room import check_room
from moelab.nn.transformer import Transformer
from moelab.paths import user_path
from moelab.registry import Registry
from moelab.tensor_parts import Part, Stored


def load_hf(
    folder: str | Path,
    registry: Registry | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The model of a Qwen2 or Qwen2-MoE checkpoint, in evaluation mode, cast to `dtype` as `model.to` does.

    Raises CheckpointError naming file, tensor and cure, before any weight is read.
    """
    folder = user_path(folder)
    model, stored = stored_hf(folder, registry)
    check_room(model, device)
    if _unsaved_buffers(model):
        # Only the constructor knows their values, so it must run for real.
        model = build_model(model.config, registry, device=device, seed=None).to(dtype)
    else:
        model = model.to(dtype).to_empty(device=device)
        model.tie_weights()
    ours = model.state_dict()
    for name, found in stored.items():
        fill_from(ours[name], found)
    return model.eval()


def stored_hf(folder: Path, registry: Registry | None = None) -> tuple[Transformer, dict[str, Stored]]:
    """(the model of a folder on the meta device, where each of our tensors lies); a tied head is left out.

    In the order in which they lie. Raises CheckpointError as `load_hf`; no weight is read.
    """
    config = read_config(folder)
    stored = TensorFolder(folder)
    check_sizes(config, stored)
    try:
        model = build_model(config, registry, device="meta", seed=None)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: can't be built: {error}") from error
    wanted = _wanted(model, stored)
    stored.check(
        {piece.name: piece.shape(shape) for shape, found in wanted.values() for piece in found},
        tied=(LM_HEAD, EMBEDDING) if config.tie_word_embeddings else None,
    )
    found = {name: Stored(shape, tuple(_part(stored, p) for p in parts)) for name, (shape, parts) in wanted.items()}
    # One file after the other: a disk reads that best.
    order = sorted(found, key=lambda name: min((part.path, part.offset) for part in found[name].parts))
    return model, {name: found[name] for name in order}


def _part(stored: TensorFolder, piece: Piece) -> Part:
    at = stored.tensors[piece.name]
    return Part(at.path, at.name, at.offset, at.dtype, at.shape, piece.index, piece.transposed)


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
