"""A user's `tokenizer.json`, through the `tokenizers` library, with the bytes of text each token stands for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from moelab.data.byte_tokenizer import byte_alphabet
from moelab.errors import DataError

# What ends a document in published vocabularies: Qwen and GPT-2, Llama 3, Llama 2 and T5, Gemma, DeepSeek.
EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|eos|>", "[EOS]")


class JsonTokenizer:
    """`content` is the tokenizer.json, `config` its tokenizer_config.json if there is one."""

    def __init__(self, content: bytes, where: str, config: bytes | None = None) -> None:
        try:
            self._tokenizer: Any = FastTokenizer.from_str(content.decode("utf-8"))
            self._definition = json.loads(content)
            self._config = json.loads(config) if config is not None else {}
        except Exception as error:  # the library raises plain Exception for any malformed file
            raise DataError(
                f"data.tokenizer: {where} is no tokenizer.json of the `tokenizers` library ({error}); "
                "transformers' `AutoTokenizer.from_pretrained(...).save_pretrained(folder)` writes one"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A special token spelled out in a document is text: it must not end the document.
        self._tokenizer.encode_special_tokens = True
        self._content = content
        self._vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not self._vocab:
            raise DataError(f"data.tokenizer: {where} has an empty vocabulary; give a trained tokenizer")
        self.vocab_size = max(self._vocab.values()) + 1
        self._eos_token = self._find_eos(where)
        self.eos_token_id = self._vocab[self._eos_token]
        self._id_bytes = self._byte_level_lengths()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._content).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encode(text).ids, np.int32)

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._encode(text)
        ids = np.array(encoding.ids, np.int32)
        total = len(text.encode("utf-8", "replace"))
        if self._id_bytes is not None:
            counts = self._id_bytes[ids]
            if counts.sum() == total:
                return ids, counts
        return ids, _bytes_by_offset(text, encoding, total)  # a normaliser has changed the text's length

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        array = np.asarray(ids, np.int64).reshape(-1)
        known = array[(array >= 0) & (array < self.vocab_size)]
        return str(self._tokenizer.decode(known.tolist(), skip_special_tokens=False))

    def id_bytes(self) -> np.ndarray | None:
        return self._id_bytes

    def files(self) -> dict[str, bytes]:
        """The file as it was given, and a tokenizer_config.json, made up if there was none."""
        config = self._config or {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._eos_token,
            "clean_up_tokenization_spaces": False,
        }
        return {"tokenizer.json": self._content, "tokenizer_config.json": json.dumps(config, indent=1).encode()}

    def _encode(self, text: str) -> Encoding:
        clean = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate would raise in Rust
        encoding: Encoding = self._tokenizer.encode(clean, add_special_tokens=False)
        return encoding

    def _find_eos(self, where: str) -> str:
        named = self._config.get("eos_token")
        if isinstance(named, dict):  # older files write the whole added token
            named = named.get("content")
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        for candidate in EOS_TOKENS:
            if candidate in added:
                return candidate
        for name in (named, *EOS_TOKENS):  # sentencepiece conversions keep </s> in the vocabulary proper
            if isinstance(name, str) and name in self._vocab:
                return name
        raise DataError(
            f"data.tokenizer: {where} has no token that ends a document (looked for {', '.join(EOS_TOKENS)}; its "
            f"added tokens are {', '.join(sorted(added)) or 'none'}); name one as eos_token in a "
            "tokenizer_config.json beside it"
        )

    def _byte_level_lengths(self) -> np.ndarray | None:
        """[V] uint32 when each token is spelled byte by byte (byte-level BPE), else None."""
        if "ByteLevel" not in _types(self._definition.get("decoder")):
            return None
        alphabet = set(byte_alphabet())
        added = self._tokenizer.get_added_tokens_decoder()
        lengths = np.zeros(self.vocab_size, np.uint32)
        for token, token_id in self._vocab.items():
            if token_id in added:  # special: stands for no text; others are spelled as they are
                lengths[token_id] = 0 if added[token_id].special else len(token.encode())
            elif alphabet.issuperset(token):
                lengths[token_id] = len(token)
            else:
                return None
        return lengths


def _types(node: Any) -> set[str]:
    """The `type` of a decoder and of those inside a Sequence of them."""
    if not isinstance(node, dict):
        return set()
    return {str(node.get("type"))}.union(*(_types(inner) for inner in node.get("decoders", [])))


def _bytes_by_offset(text: str, encoding: Encoding, total: int) -> np.ndarray:
    """[n] uint32 summing to `total`: each token takes the bytes since the last one's end, the last takes the rest.

    Tokens that share a character: the first takes its bytes.
    """
    counts = np.zeros(len(encoding.ids), np.uint32)
    if not len(counts):
        return counts
    code_points = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    byte_of_character = np.concatenate([[0], np.cumsum(widths)])  # [characters + 1]
    ends = byte_of_character[np.array([end for _, end in encoding.offsets], np.int64)]
    ends = np.maximum.accumulate(ends)
    ends[-1] = total
    counts[:] = np.diff(ends, prepend=0)
    return counts
