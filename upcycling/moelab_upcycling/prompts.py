"""The source's tokenizer, embeddings and hidden states, for routers made from prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moelab.errors import CheckpointError, ConfigError
from moelab.hf import roles as names
from moelab.initialisers import PromptReader
from moelab_upcycling.dense_states import DenseStates
from moelab_upcycling.dtypes import to_float32
from moelab_upcycling.source import DenseSource

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer


def prompt_reader(source: DenseSource) -> PromptReader:
    """Reads nothing until it is asked."""

    path = source.folder / "tokenizer.json"

    @cache
    def tokenizer() -> FastTokenizer:
        from moelab.data.tokenizer_file import load_fast  # noqa: PLC0415  (only these routers need it)

        if not path.exists():
            raise CheckpointError(f"{path}: no such file; a router made from prompts needs the source's tokenizer")
        return load_fast(path)

    def encode(text: str) -> list[int]:
        from moelab.data.tokenizer_file import guarded  # noqa: PLC0415

        return list(guarded(lambda: tokenizer().encode(text).ids, path))

    def embed(tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        tensor = source.tensors[names.EMBEDDING]
        if not tokens or min(tokens) < 0 or max(tokens) >= tensor.shape[0]:
            raise ConfigError(f"token ids must be in 0 .. {tensor.shape[0] - 1}, and at least one")
        return to_float32(source.gathered(names.EMBEDDING, np.asarray(tokens)), tensor.dtype)

    return PromptReader(encode, embed, DenseStates(source).entering)
