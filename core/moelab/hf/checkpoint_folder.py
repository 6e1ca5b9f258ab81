"""A folder of weights in Hugging Face's layout, or a GGUF file, opened: its model, and its tensors by our names.

Free of torch: upcycling opens its sources here too.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from moelab.config.model import ModelConfig
from moelab.dense_sources import DenseArchitecture
from moelab.errors import CheckpointError
from moelab.hf.config import describe
from moelab.hf.files import TensorFolder
from moelab.hf.gguf_file import GGUFFile, gguf_of
from moelab.hf.moe_formats import MoEFormat
from moelab.hf.mxfp4 import joined
from moelab.hf.scaled_blocks import with_scales
from moelab.hf.sizes import check_sizes
from moelab.registry import Registry

logger = logging.getLogger("moelab")
_ROTATED = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.(weight|bias)")


@dataclass(frozen=True)
class CheckpointFolder:
    """What was found there. The tensors go by the names of hf/names.py, whatever the files call them."""

    config: ModelConfig
    kind: DenseArchitecture | MoEFormat
    model_type: str
    stored: TensorFolder


def open_folder(folder: Path, registry: Registry | None = None) -> CheckpointFolder:
    """Config and headers; no weight is read.

    `registry`: the plugins that may know the kind of model; None: the installed ones. Raises CheckpointError naming
    file, place and cure.
    """
    found = describe(folder, registry)
    stored = TensorFolder(folder)
    if isinstance(found.kind, MoEFormat) and found.kind.in_turns:
        stored.tensors = joined(stored.tensors)
    check_sizes(found.config, stored)
    if found.block is not None:
        stored.tensors = with_scales(stored.tensors, found.block)
        logger.warning("%s: weights of eight bits are read times the scales of their %d x %d", folder, *found.block)
    paired: dict[str, int] = {}
    gguf = gguf_of(folder)
    if gguf is not None:
        rows = found.kind.gguf_rows if isinstance(found.kind, DenseArchitecture) else None
        if rows is None:
            raise CheckpointError(
                f"{gguf}: general.architecture: '{GGUFFile.of(gguf).architecture}' is not read from GGUF; take the "
                "safetensors that it was made from"
            )
        if rows == "pairs":
            heads = {"q": found.config.num_attention_heads, "k": found.config.num_key_value_heads}
            paired = {name: heads[match[1]] for name in stored.tensors if (match := _ROTATED.fullmatch(name))}
    left_out = stored.rename(
        lambda name: [(part.name, part.first, part.rows) for part in found.kind.parts(name, found.config)], paired
    )
    if left_out and isinstance(found.kind, MoEFormat):
        logger.warning("%s: %d tensors are left out (%s): %s", folder, len(left_out), left_out[0], found.kind.left_out)
    return CheckpointFolder(found.config, found.kind, found.model_type, stored)
