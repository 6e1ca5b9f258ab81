"""Which folders of weights are ours to read for transformers, and by which of its arguments.

transformers itself is not imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moelab.checkpoint import CHECKPOINTS, is_moelab
from moelab.errors import CheckpointError
from moelab.hf.config import ADAPTED, CONFIG_FILE
from moelab.hf.files import read_json
from moelab.loading import load
from moelab.nn.transformer import Transformer
from moelab.registry import Registry

MODEL_TYPE = ADAPTED
FOLLOWED = ("config", "torch_dtype", "dtype", "device_map", "registry", "trust", "output_loading_info", "_from_auto")
HARMLESS = (
    "use_safetensors", "local_files_only", "low_cpu_mem_usage", "trust_remote_code", "attn_implementation",
    "cache_dir", "force_download", "token", "revision", "adapter_kwargs", "_commit_hash", "subfolder", "proxies",
)  # fmt: skip


def is_ours(path: Any) -> bool:
    """Whether `moelab.load` reads it: any folder of weights but what `save_pretrained` wrote."""
    if not isinstance(path, str | Path) or not Path(path).is_dir():
        return False
    if is_run(path):
        return True
    config = Path(path) / CONFIG_FILE
    return config.is_file() and read_json(config).get("model_type") != MODEL_TYPE


def is_run(path: Any) -> bool:
    """Whether it is a run folder or a moelab checkpoint, which `read_origin` tells the model of."""
    if not isinstance(path, str | Path):
        return False
    folder = Path(path)
    return (folder / CHECKPOINTS).is_dir() or is_moelab(folder)


def read_folder(folder: Path, asked: dict[str, Any]) -> Transformer:
    """The model of a folder that `is_ours`, by the arguments of `from_pretrained`.

    Raises CheckpointError for an argument that only transformers' own loading could follow.
    """
    unknown = sorted(name for name in asked if name not in FOLLOWED + HARMLESS and asked[name] is not None)
    if unknown:
        raise CheckpointError(
            f"{folder}: {', '.join(unknown)}: a folder of moelab's own is read by moelab.load, which has no such "
            f"argument; write it with save_pretrained and load that, or leave it out"
        )
    dtype = asked.get("dtype", asked.get("torch_dtype"))
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype)
    registry: Registry | None = asked.get("registry")
    return load(
        folder,
        dtype=dtype or torch.float32,
        device=_device(folder, asked.get("device_map")),
        registry=registry,
        trust=bool(asked.get("trust")),
    )


def _device(folder: Path, device_map: Any) -> torch.device | str:
    """`device_map` where it means one device."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return "cpu"
    if isinstance(device_map, torch.device):
        return device_map
    if isinstance(device_map, int):
        return f"cuda:{device_map}"
    if isinstance(device_map, str) and device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
        return device_map
    raise CheckpointError(f"{folder}: device_map {device_map!r}: give one device, 'cuda' or 'cpu'")
