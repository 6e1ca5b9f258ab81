"""Folders of weights for transformers: a run's as its models, and `AutoModelForCausalLM` told of them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from moelab.adapter.causal_lm import MODEL_TYPE, MoelabConfig, MoelabForCausalLM
from moelab.checkpoint import CHECKPOINTS, is_moelab
from moelab.data.tokenizer import Tokenizer
from moelab.errors import CheckpointError, UserError
from moelab.hf.carried import TOKENIZER_FILE
from moelab.hf.config import CONFIG_FILE
from moelab.hf.files import read_json
from moelab.loading import load
from moelab.nn.transformer import Transformer
from moelab.origin import read_origin
from moelab.registry import Registry

IGNORED = ("config", "torch_dtype", "dtype", "device_map", "registry", "trust", "output_loading_info", "_from_auto")
HARMLESS = (
    "use_safetensors", "local_files_only", "low_cpu_mem_usage", "trust_remote_code", "attn_implementation",
    "cache_dir", "force_download", "token", "revision", "adapter_kwargs", "_commit_hash", "subfolder", "proxies",
)  # fmt: skip


def as_transformers(model: Transformer) -> MoelabForCausalLM:
    """`model` as a transformers causal language model, whatever its routers; nothing is copied.

    `generate`, `labels`, masks, caches and `save_pretrained` are transformers' own. A model that `moelab.load` read
    stops where its folder says. Imports transformers, which is no dependency of moelab: raises ImportError without it.
    """
    adapted = MoelabForCausalLM(MoelabConfig.of(model.config, dtype=model.embed_tokens.weight.dtype), model)
    adapted.train(model.training)
    try:
        speech = model.speech() if callable(model.speech) else model.speech
    except UserError:  # a folder without a tokenizer
        speech = None
    if speech is not None:
        model.speech = speech
        ends = list(speech.end_token_ids)
        adapted.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        adapted.generation_config.pad_token_id = ends[0]
    return adapted


def transformers_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of moelab as one of transformers: the same ids, no token added, the end of a text as its padding."""
    definition = tokenizer.files()[TOKENIZER_FILE].decode("utf-8")
    fast = FastTokenizer.from_str(definition)
    end = fast.id_to_token(tokenizer.eos_token_id)
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=end, pad_token=end, padding_side="left")


def register_with_transformers() -> None:
    """Let `AutoConfig` and `AutoModelForCausalLM` read run folders, moelab checkpoints and model_type "moelab".

    A run folder has no config.json, so `AutoConfig.from_pretrained` is asked here first. Calling it again changes
    nothing. Hugging Face's own folders are read as before, by transformers' own classes.
    """
    AutoConfig.register(MODEL_TYPE, MoelabConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoelabConfig, MoelabForCausalLM, exist_ok=True)
    theirs = AutoConfig.from_pretrained
    if getattr(theirs, "reads_moelab", False):
        return

    @functools.wraps(theirs)
    def from_pretrained(pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_run(pretrained_model_name_or_path):
            return theirs(pretrained_model_name_or_path, *args, **kwargs)
        config = MoelabConfig.of(read_origin(pretrained_model_name_or_path).model)
        return (config, kwargs) if kwargs.pop("return_unused_kwargs", False) else config

    from_pretrained.reads_moelab = True  # type: ignore[attr-defined]
    AutoConfig.from_pretrained = staticmethod(from_pretrained)


def is_ours(path: Any) -> bool:
    """Whether `moelab.load` reads it: any folder of weights but what `save_pretrained` wrote."""
    if not isinstance(path, str | Path) or not Path(path).is_dir():
        return False
    if _is_run(path):
        return True
    config = Path(path) / CONFIG_FILE
    return config.is_file() and read_json(config).get("model_type") != MODEL_TYPE


def _is_run(path: Any) -> bool:
    """Whether it is a run folder or a moelab checkpoint, which `read_origin` tells the model of."""
    if not isinstance(path, str | Path):
        return False
    folder = Path(path)
    return (folder / CHECKPOINTS).is_dir() or is_moelab(folder)


def read_folder(folder: Path, asked: dict[str, Any]) -> Any:
    """The model of a folder that `is_ours`, by the arguments of `from_pretrained`.

    Raises CheckpointError for an argument that only transformers' own loading could follow.
    """
    unknown = sorted(name for name in asked if name not in IGNORED + HARMLESS and asked[name] is not None)
    if unknown:
        raise CheckpointError(
            f"{folder}: {', '.join(unknown)}: a folder of moelab's own is read by moelab.load, which has no such "
            f"argument; write it with save_pretrained and load that, or leave it out"
        )
    dtype = asked.get("dtype", asked.get("torch_dtype"))
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype)
    registry: Registry | None = asked.get("registry")
    model = load(
        folder,
        dtype=dtype or torch.float32,
        device=_device(folder, asked.get("device_map")),
        registry=registry,
        trust=bool(asked.get("trust")),
    )
    adapted = as_transformers(model)
    adapted.name_or_path = str(folder)
    told = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return (adapted, told) if asked.get("output_loading_info") else adapted


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
