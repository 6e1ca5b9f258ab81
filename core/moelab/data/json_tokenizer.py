"""A user's `tokenizer.json`, through the `tokenizers` library, with the bytes of text each token stands for.

One text has one sequence of ids: what a file says of sampling (BPE dropout, Provilkov et al. 2020; unigram sampling,
Kudo 2018), of cutting and of padding is taken out of it, told, and left out of what a checkpoint carries.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Encoding

from moelab.data.byte_tokenizer import byte_alphabet
from moelab.data.special_tokens import spelling
from moelab.data.tokenizer_file import check_definition, definition_of, fast_tokenizer, guarded
from moelab.errors import DataError

# What ends a document in published vocabularies: Qwen and GPT-2, Llama 3, Llama 2 and T5, Gemma, DeepSeek.
EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|eos|>", "[EOS]")
# Fields of a tokenizer.json by which one text could become other ids: of its model, and of the file itself.
SAMPLING, CUTTING = ("dropout", "alpha", "nbest_size"), ("truncation", "padding")

logger = logging.getLogger("moelab")


class JsonTokenizer:
    """`content` is the tokenizer.json, `config` its tokenizer_config.json if there is one."""

    def __init__(self, content: bytes, where: str, config: bytes | None = None) -> None:
        self._where = where
        self._definition = definition_of(content, where)
        check_definition(self._definition, where)
        content = _deterministic(content, self._definition, where)
        self._tokenizer: Any = fast_tokenizer(content, where)
        self._config = {} if config is None else definition_of(config, f"tokenizer_config.json beside {where}")
        # A special token spelled out in a document is text: it must not end the document.
        self._tokenizer.encode_special_tokens = True
        self._content = content
        self._vocab: dict[str, int] = guarded(self._tokenizer.get_vocab, where)
        if not self._vocab:
            raise DataError(f"data.tokenizer: {where} has an empty vocabulary; give a trained tokenizer")
        self.vocab_size = max(self._vocab.values()) + 1
        self._eos_token = self._find_eos(where)
        self.eos_token_id = self._vocab[self._eos_token]
        self._id_bytes = self._byte_level_lengths()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = tuple(sorted(token.content for token in added.values() if token.special))
        self._control = np.array([i for i, token in added.items() if token.special and i != self._unknown()], np.int64)
        self._spelled = spelling(self.special_tokens)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._content).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.concatenate([np.array(encoding.ids, np.int32) for _, encoding in self._encode(text)])

    def encode_many(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`encode_with_bytes` of each: in one call, on all cores, without offsets where the ids' bytes suffice."""
        lengths = self._id_bytes
        if lengths is None:
            return [self.encode_with_bytes(text) for text in texts]
        encoded = [text.encode("utf-8", "replace") for text in texts]
        clean = [one.decode("utf-8") for one in encoded]
        fast = guarded(lambda: self._tokenizer.encode_batch_fast(clean, add_special_tokens=False), self._where)
        found = []
        for text, one, encoding in zip(texts, encoded, fast, strict=True):
            ids = np.array(encoding.ids, np.int32)
            counts = lengths[ids]
            whole = counts.sum() == len(one) and not np.isin(self._control, ids).any()
            found.append((ids, counts) if whole else self.encode_with_bytes(text))
        return found

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        pieces = self._encode(text)
        ids = np.concatenate([np.array(encoding.ids, np.int32) for _, encoding in pieces])
        if self._id_bytes is not None:
            counts = self._id_bytes[ids]
            if counts.sum() == len(text.encode("utf-8", "replace")):
                return ids, counts
        # A normaliser has changed the text's length, or this vocabulary has no bytes of its own.
        return ids, np.concatenate([_bytes_by_offset(piece, encoding) for piece, encoding in pieces])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        array = np.asarray(ids, np.int64).reshape(-1)
        known = array[(array >= 0) & (array < self.vocab_size)]
        return str(self._tokenizer.decode(known.tolist(), skip_special_tokens=False))

    def id_bytes(self) -> np.ndarray | None:
        return self._id_bytes

    def files(self) -> dict[str, bytes]:
        """The file (without what made it random or cut texts), and a tokenizer_config.json, made up if need be."""
        config = self._config or {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._eos_token,
            "clean_up_tokenization_spaces": False,
        }
        return {"tokenizer.json": self._content, "tokenizer_config.json": json.dumps(config, indent=1).encode()}

    def _encode(self, text: str) -> list[tuple[str, Encoding]]:
        """[(piece of the text, its encoding)]: one piece, unless the whole would hold a control token.

        A unigram model has `</s>` among its pieces and finds it in a text, whatever is said of special tokens; cut
        inside the spelling it does not.
        """
        clean = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate would raise in Rust
        whole = self._encoding(clean)
        if not np.isin(self._control, whole.ids).any():
            return [(clean, whole)]
        cuts = [0, *(match.start() + 1 for match in self._spelled.finditer(clean)), len(clean)]
        pieces = [clean[begin:end] for begin, end in pairwise(cuts)]
        return [(piece, self._encoding(piece)) for piece in pieces]

    def _encoding(self, text: str) -> Encoding:
        return guarded(lambda: self._tokenizer.encode(text, add_special_tokens=False), self._where)

    def _unknown(self) -> int | None:
        """The id of what the vocabulary has no token for: it may stand anywhere."""
        model = self._definition["model"]
        by_name = self._vocab.get(str(model.get("unk_token")))
        return by_name if by_name is not None else model.get("unk_id")

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


def _deterministic(content: bytes, definition: dict[str, Any], where: str) -> bytes:
    """The file without what samples, cuts or pads (`definition` too); the same bytes where there is nothing of it."""
    model = definition["model"]
    found = {f"model.{key}": model.get(key) for key in SAMPLING} | {key: definition.get(key) for key in CUTTING}
    found = {key: value for key, value in found.items() if value}
    if not found:
        return content
    for key in found:
        owner, _, name = key.rpartition(".")
        (model if owner else definition)[name] = None
    said = ", ".join(f"{key} {json.dumps(value)}" for key, value in found.items())
    logger.warning(
        "data.tokenizer: %s says %s; it is turned off here and in what checkpoints carry, so that a text always has "
        "the same ids, and all of them", where, said,
    )  # fmt: skip
    return json.dumps(definition, ensure_ascii=False).encode()


def _types(node: Any) -> set[str]:
    """The `type` of a decoder and of those inside a Sequence of them."""
    if not isinstance(node, dict):
        return set()
    return {str(node.get("type"))}.union(*(_types(inner) for inner in node.get("decoders", [])))


def _bytes_by_offset(text: str, encoding: Encoding) -> np.ndarray:
    """[n] uint32 summing to the text's: each token takes the bytes since the last one's end, the last takes the rest.

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
    ends[-1] = byte_of_character[-1]
    counts[:] = np.diff(ends, prepend=0)
    return counts
