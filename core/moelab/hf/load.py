"""A Hugging Face folder -> a model: config first, then headers, then weights, and nothing left unloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moelab.builder import build_model
from moelab.errors import CheckpointError, ConfigError
from moelab.hf.checkpoint_folder import open_folder
from moelab.hf.files import TensorFolder
from moelab.hf.moe_formats import MoEFormat
from moelab.hf.mxfp4 import MXFP4, read_expert
from moelab.hf.names import EMBEDDING, LM_HEAD, Piece, Shape, pieces, pieces_in_turns
from moelab.nn.pieces import fill_from
from moelab.nn.room import check_room
from moelab.nn.transformer import Transformer
from moelab.paths import user_path
from moelab.registry import Registry
from moelab.stored_weights import build_empty, fill
from moelab.tensor_parts import Part, Stored


def load_hf(
    folder: str | Path,
    registry: Registry | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The model of a folder, of any kind that hf/config.py reads, for evaluation, cast to `dtype` as `model.to` does.

    Raises CheckpointError naming file, tensor and cure, before any weight is read.
    """
    weights = HFWeights(user_path(folder), registry)
    check_room(weights.model, device)
    model = build_empty(weights.model.config, registry, weights.shapes, dtype=dtype, device=device)
    fill(model, weights)
    return model.eval()


class HFWeights:
    """The weights of a folder under our names; opening it checks them all and reads none."""

    def __init__(self, folder: Path, registry: Registry | None = None) -> None:
        """Raises CheckpointError naming file, tensor and cure."""
        opened = open_folder(folder, registry)
        config, self._folder = opened.config, opened.stored
        try:
            self.model = build_model(config, registry, device="meta", seed=None)  # without a number in it
        except ConfigError as error:
            raise CheckpointError(f"{folder / 'config.json'}: can't be built: {error}") from error
        turns = isinstance(opened.kind, MoEFormat) and opened.kind.in_turns
        wanted = _wanted(self.model, pieces_in_turns if turns else partial(_apart_or_fused, self._folder))
        self._folder.check(
            {piece.name: piece.shape(shape) for shape, found in wanted.values() for piece in found},
            tied=(LM_HEAD, EMBEDDING) if config.tie_word_embeddings else None,
        )
        parts = {
            name: Stored(shape, tuple(part for piece in found for part in self._parts(piece)))
            for name, (shape, found) in wanted.items()
        }
        order = sorted(parts, key=lambda name: min((part.path, part.offset) for part in parts[name].parts))
        self.stored = {name: parts[name] for name in order}
        self.shapes: dict[str, Shape] = {name: wanted[name][0] for name in order}

    def read_into(self, name: str, tensor: Tensor) -> None:
        """`name` as the model has it: each expert's matrices into their bank; of a piece of it, what lies there."""
        fill_from(tensor, self.stored[name])

    def _parts(self, piece: Piece) -> list[Part]:
        at = self._folder.tensors[piece.name]
        decoded = None if at.is_plain else partial(self._folder.read, piece.name)
        part = Part(at.path, at.name, at.offset, at.dtype, at.shape, piece.index, piece.transposed, piece.turn, decoded)
        if at.encoding != MXFP4:
            return [part]
        return [  # one expert at a time: what is decoded takes four times its bytes
            replace(part, index=(slice(e, e + 1), *piece.index[1:]), decoded=partial(read_expert, at, e))
            for e in range(at.shape[0])
        ]


def _wanted(model: Transformer, pieces_of: Callable[[str, Shape], list[Piece]]) -> dict[str, tuple[Shape, list[Piece]]]:
    """Our name -> its shape and the stored tensors it is read from."""
    wanted = {}
    for name, tensor in model.state_dict().items():
        if name == LM_HEAD and model.config.tie_word_embeddings:
            continue
        shape = tuple(tensor.shape)
        wanted[name] = (shape, pieces_of(name, shape))
    return wanted


def _apart_or_fused(stored: TensorFolder, name: str, shape: Shape) -> list[Piece]:
    """Experts as the folder has them."""
    fused = pieces(name, shape, fused=True)
    return fused if all(p.name in stored.tensors for p in fused) else pieces(name, shape)
