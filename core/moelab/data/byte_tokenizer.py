"""The tokenizer that needs no file: a token is a byte, and 256 ends a document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

EOS_TOKEN = "<|endoftext|>"


class ByteTokenizer:
    """Ids 0 .. 255 are the bytes of UTF-8, 256 is <|endoftext|>."""

    vocab_size = 257
    eos_token_id = 256
    special_tokens = (EOS_TOKEN,)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.files()["tokenizer.json"]).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """-> ids [n] int32; lone surrogates, which UTF-8 has no bytes for, become '?'."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """-> ids [n] int32 and ones [n] uint32."""
        ids = self.encode(text)
        return ids, np.ones(len(ids), np.uint32)

    def encode_many(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`encode_with_bytes` of each text."""
        return [self.encode_with_bytes(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """-> text; 256 is spelled out, larger ids vanish (a model's vocabulary may be padded)."""
        array = np.asarray(ids, np.int64).reshape(-1)
        pieces = np.split(array, np.flatnonzero(array == self.eos_token_id))
        texts = [p[(p >= 0) & (p < 256)].astype(np.uint8).tobytes().decode("utf-8", "replace") for p in pieces]
        return EOS_TOKEN.join(texts)

    def id_bytes(self) -> np.ndarray:
        """[257] uint32: one each, none for the end of a document."""
        return np.append(np.ones(256, np.uint32), np.uint32(0))

    def files(self) -> dict[str, bytes]:
        """The same tokenizer for `tokenizers` and transformers: byte-level BPE with no merges."""
        return dict(_files())


def byte_alphabet() -> list[str]:
    """The printable character by which byte-level BPE (Radford et al. 2019) spells each of the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [spelled[byte] for byte in range(256)]


@cache
def _files() -> tuple[tuple[str, bytes], ...]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {symbol: byte for byte, symbol in enumerate(byte_alphabet())},
        "merges": [],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256, "content": EOS_TOKEN, **flags}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
        "model_max_length": 1_000_000_000,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # '<|endoftext|>' inside a text is its 13 characters
    }
    return (
        ("tokenizer.json", json.dumps(tokenizer, indent=1).encode()),
        ("tokenizer_config.json", json.dumps(config, indent=1).encode()),
    )
