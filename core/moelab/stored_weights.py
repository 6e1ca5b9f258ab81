"""Weights that lie on disk, and a model that is filled with them: one tensor after the other, and nothing twice.

What offers them: `hf/load.py` of a Hugging Face folder, `checkpoint.py` of moelab's own. Whoever needs other weights in
a model writes a `StoredWeights`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor

from moelab.builder import build_model
from moelab.config.model import ModelConfig
from moelab.nn.transformer import Transformer
from moelab.registry import Registry

Shape = tuple[int, ...]


class StoredWeights(Protocol):
    """Tensors by the model's names, a tied head left out."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Of all of them, in the order in which a disk reads them best."""
        ...

    def read_into(self, name: str, tensor: Tensor) -> None:
        """Set `tensor`, of the shape that `shapes` gives, to the values; its type and device are its own.

        Of one that lies in pieces over several processes, this one's: `moelab.nn.pieces.fill_from` does that.

        Raises CheckpointError where they can't be read.
        """
        ...


@torch.no_grad()
def fill(model: Transformer, stored: StoredWeights) -> None:
    """Set everything that is stored, in place; the rest stays as it is."""
    tensors = model.state_dict()
    for name in stored.shapes:
        stored.read_into(name, tensors[name])


def build_empty(
    config: ModelConfig,
    registry: Registry | None,
    stored: Collection[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int | None = None,
) -> Transformer:
    """A model that `fill` is to complete: nothing is drawn for what is `stored`.

    Whatever else it has is as its constructor makes it, with a `seed` as `build_model` draws it. A part that is not
    ours may hold tensors that are neither parameters nor buffers, so its constructor runs for real.
    """
    model = build_model(config, registry, device="meta", seed=None)
    held = {name for name, _ in model.named_buffers()} - set(stored)
    if held or not all(part.ours for part, _ in model.plugin_parts()):
        return build_model(config, registry, device=device, seed=seed, stored=stored).to(dtype)
    # As `to_empty`, whose `empty_like` of a meta tensor imports sympy: a third of a second and 40 MB.
    model = model.to(dtype)._apply(lambda one: torch.empty(one.shape, dtype=one.dtype, device=device))
    model.tie_weights()
    return model
