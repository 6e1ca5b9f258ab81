"""Text <-> token ids. `bytes` needs no file; anything else is a `tokenizer.json` read by the `tokenizers` library.

Every tokenizer says how many bytes of text each token stands for, so that bits per byte compares models
with different vocabularies exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from moelab.errors import CheckpointError, DataError
from moelab.hub import commit_of, user_folder
from moelab.paths import unresolved_hint
from moelab.safe_files import Reading, read_bytes

READING = Reading(DataError, "data.tokenizer names it: write it again, or name another")


class Tokenizer(Protocol):
    """What the rest of moelab asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eos_token_id(self) -> int:
        """Ends a document."""

    @property
    def fingerprint(self) -> str:
        """sha256 of what defines it: equal fingerprints give equal ids."""

    @property
    def special_tokens(self) -> Sequence[str]:
        """How the control tokens are spelled; `encode` reads these spellings as text."""

    def encode(self, text: str) -> np.ndarray:
        """-> ids [n] int32. No token is added, and no special token is found inside the text."""

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """-> ids [n] int32 and the UTF-8 bytes of text each stands for [n] uint32, summing to the text's."""

    def encode_many(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`encode_with_bytes` of each text, together and so faster."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """-> text; broken UTF-8 becomes U+FFFD and ids outside the vocabulary vanish: never raises."""

    def id_bytes(self) -> np.ndarray | None:
        """[vocab_size] uint32, the bytes of each id; None when they depend on the text around it."""

    def files(self) -> dict[str, bytes]:
        """{file name: content} with which transformers' AutoTokenizer loads it."""


def load_tokenizer(spec: str) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json or of a folder that holds one.

    Raises DataError naming the file and the cure.
    """
    from moelab.data.byte_tokenizer import ByteTokenizer  # noqa: PLC0415  (both build on this module)
    from moelab.data.json_tokenizer import JsonTokenizer  # noqa: PLC0415

    byte_tokenizer = ByteTokenizer()
    if spec == "bytes":
        return byte_tokenizer
    path = _path(spec)
    if not path.is_file():
        raise DataError(
            f"data.tokenizer: no file {path}; give 'bytes', or the path of a tokenizer.json or of a folder holding one"
            + unresolved_hint(spec)
        )
    content = read_bytes(path, READING)
    if content == byte_tokenizer.files()["tokenizer.json"]:
        return byte_tokenizer  # one of our own checkpoints: the same ids, hundreds of times as fast
    config = path.with_name("tokenizer_config.json")
    return JsonTokenizer(content, str(path), read_bytes(config, READING) if config.is_file() else None)


def tokenizer_commit(spec: str) -> str | None:
    """The commit on the Hugging Face hub that `data.tokenizer` means; None of what lies elsewhere."""
    return None if spec == "bytes" else commit_of(_path(spec).parent)


def _path(spec: str) -> Path:
    """Of the tokenizer.json, there or not."""
    try:
        path = user_folder(spec, "data.tokenizer")
    except CheckpointError as error:
        raise DataError(f"data.tokenizer: {error}{unresolved_hint(spec)}") from error
    return path / "tokenizer.json" if path.is_dir() else path
