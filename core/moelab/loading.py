"""A model from any folder that holds one: a run folder, a moelab checkpoint, or a Hugging Face folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from moelab.builder import build_hollow, build_model
from moelab.checkpoint import OwnWeights, is_moelab, read_run_config
from moelab.data.chat import ChatTemplate
from moelab.data.tokenizer import Tokenizer
from moelab.errors import CheckpointError
from moelab.hf.carried import tokenizer_side_files
from moelab.hf.gguf_file import gguf_of
from moelab.hf.load import HFWeights, load_hf
from moelab.hub import user_folder
from moelab.integrity import verified
from moelab.nn.texts import Speech
from moelab.nn.transformer import Transformer
from moelab.origin import end_token_ids, read_origin, sampling_settings
from moelab.registry import Registry
from moelab.stored_weights import StoredWeights, build_empty, fill
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
    folder = verified(user_folder(path), verify=verify)
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
    if is_moelab(folder):
        plugins = stored_registry(read_run_config(folder), folder, registry=registry, trust=trust)
        model = _own(folder, plugins, dtype, device).eval()
    else:
        model = load_hf(folder, dtype=dtype, device=device)
    model.folder, model.speech = folder, partial(speech_of, folder)
    return model


def open_model(
    folder: Path, *, registry: Registry | None = None, trust: bool = False
) -> tuple[Transformer, StoredWeights]:
    """The model of a folder that `verified` gave, its matrices on the meta device, and the weights to read them from.

    For who takes one tensor after the other. Raises CheckpointError as `open_weights`.
    """
    plugins = registry or Registry()
    if is_moelab(folder):
        plugins = stored_registry(read_run_config(folder), folder, registry=registry, trust=trust)
    weights = open_weights(folder, registry=plugins)
    config = weights.model.config if isinstance(weights, HFWeights) else read_run_config(folder).model
    model = build_hollow(config, plugins, device=torch.device("cpu"), seed=0)
    tensors = model.state_dict()
    for name in weights.shapes:
        if not tensors[name].is_meta:  # what a plugin may answer by
            weights.read_into(name, tensors[name])
    return model.eval(), weights


def open_weights(folder: Path, *, registry: Registry | None = None) -> StoredWeights:
    """The weights of a folder that `verified` gave, each checked to be there and to fit the folder's own config.

    Raises CheckpointError naming the file and the cure.
    """
    if not is_moelab(folder):
        return HFWeights(folder)
    config = read_run_config(folder)
    weights = OwnWeights(folder)
    weights.check(
        build_model(config.model, stored_registry(config, folder, registry=registry), device="meta", seed=None)
    )
    return weights


def _own(folder: Path, plugins: Registry, dtype: torch.dtype, device: torch.device | str) -> Transformer:
    """Of a moelab checkpoint. What does not fit is refused before memory is asked for."""
    config, weights = read_run_config(folder).model, OwnWeights(folder)
    weights.check(build_model(config, plugins, device="meta", seed=None))
    model = build_empty(config, plugins, weights.shapes, dtype=dtype, device=device)
    fill(model, weights)
    return model


def chat_template_of(folder: Path, tokenizer: Tokenizer | None = None) -> ChatTemplate:
    """The chat template of a folder of weights, as `ChatTemplate.from_tokenizer` chooses; ChatML where it has none.

    `tokenizer`: to be used in place of its own, and its template too. Raises CheckpointError where there is neither.
    """
    if tokenizer is not None:
        return ChatTemplate.from_tokenizer(tokenizer)
    tokenizer = speech_of(folder).tokenizer
    beside = {} if gguf_of(folder) is not None else tokenizer_side_files(folder)
    return ChatTemplate.from_tokenizer(tokenizer, beside, where=str(folder))


def speech_of(folder: Path) -> Speech:
    """The tokenizer of a folder of weights, and the tokens that end a text there.

    Raises CheckpointError where it has none.
    """
    origin = read_origin(folder)
    tokenizer = origin.own_tokenizer()
    if tokenizer is None:
        raise CheckpointError(f"{folder}: holds no tokenizer.json; name one, tokenizer=PATH, or tokenizer='bytes'")
    ends = end_token_ids(folder)
    return Speech(tokenizer, ends[0] if ends else (tokenizer.eos_token_id,), sampling_settings(folder))
