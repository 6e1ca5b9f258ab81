"""A model from any folder that holds one: a run folder, a moelab checkpoint, or a Hugging Face folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from moelab.builder import build_model
from moelab.checkpoint import (
    MODEL,
    is_moelab,
    load_model_tensors,
    model_tensors,
    read_run_config,
    refuse_misfits,
    stored_tensors,
)
from moelab.data.tokenizer import load_tokenizer
from moelab.errors import CheckpointError
from moelab.hf.load import load_hf, stored_hf
from moelab.integrity import verified
from moelab.nn.generate import Speech
from moelab.nn.transformer import Transformer
from moelab.origin import end_token_ids, read_origin
from moelab.paths import user_path
from moelab.registry import Registry
from moelab.tensor_parts import Stored
from moelab.trust import stored_registry


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    registry: Registry | None = None,
    trust: bool = False,
    verify: bool = True,
) -> Transformer:
    """The model of a checkpoint, in evaluation mode: a Hugging Face folder, a moelab checkpoint, or a run folder.

    Of a run folder the newest checkpoint, compared with its checksums: where it is damaged, the error names the one
    before it that is whole (`verify=False` takes it as it is). Routers that drop, add noise or look ahead while
    training do so only after `model.train()`. `model.generate("text")` reads the folder's tokenizer when first called.

    `registry`: the plugins that you name, `Registry(["my_router"])`; None: the installed ones. Other code that the
    folder names is imported only with `trust`. Raises CheckpointError naming the file and the cure.
    """
    folder = verified(user_path(path), verify=verify)
    return read_model(folder, dtype=dtype, device=device, registry=registry, trust=trust)


def read_model(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    registry: Registry | None = None,
    trust: bool = False,
) -> Transformer:
    """`load` of a folder that `verified` gave."""
    if not is_moelab(folder):
        model = load_hf(folder, dtype=dtype, device=device)
        model.speech = partial(speech_of, folder)
        return model
    config = read_run_config(folder)
    plugins = stored_registry(config, folder, registry=registry, trust=trust)
    check_shapes(folder, build_model(config.model, plugins, device="meta", seed=None))
    model = build_model(config.model, plugins, device=device, seed=None)
    load_model_tensors(folder, model)
    model.speech = partial(speech_of, folder)
    return model.to(dtype).eval()


def speech_of(folder: Path) -> Speech:
    """The tokenizer of a folder of weights, and the tokens that end a text there.

    Raises CheckpointError where it has none.
    """
    origin = read_origin(folder)
    if origin.tokenizer is None:
        raise CheckpointError(f"{folder}: holds no tokenizer.json; name one, tokenizer=PATH, or tokenizer='bytes'")
    tokenizer = load_tokenizer(origin.tokenizer)
    ends = end_token_ids(folder)
    return Speech(tokenizer, ends[0] if ends else (tokenizer.eos_token_id,))


def stored_model(folder: Path, registry: Registry) -> dict[str, Stored]:
    """Where each tensor lies of a folder that `verified` gave: {our name: where}, a tied head as its embedding.

    Raises CheckpointError where they are not those of the folder's own config; no weight is read.
    """
    if is_moelab(folder):
        config = read_run_config(folder)
        model = build_model(config.model, stored_registry(config, folder, registry=registry), device="meta", seed=None)
        check_shapes(folder, model)
        stored = stored_tensors(folder, MODEL)
    else:
        model, stored = stored_hf(folder)
    if model.config.tie_word_embeddings:
        stored["lm_head.weight"] = stored["embed_tokens.weight"]
    return stored


def check_shapes(folder: Path, model: Transformer) -> None:
    """Whether the file holds what `model`, on the meta device, is made of: before memory is asked for.

    Raises CheckpointError naming what is missing, or of another shape.
    """
    found = {name: tensor.shape for name, tensor in stored_tensors(folder, MODEL).items()}
    refuse_misfits(folder / MODEL, found, {name: tuple(t.shape) for name, t in model_tensors(model).items()})
