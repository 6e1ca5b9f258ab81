"""Which document is it, and on which side of the split does it stand: 64-bit hashes of content, and of nothing else.

n documents, N tokens. Two texts that differ in case or white space alone are one document here: they fall on one
side of every split, and whoever was trained on one has seen the other. Among a million documents two different ones
share a 64-bit hash with probability 3e-8 (n^2 / 2^65).
"""

from __future__ import annotations

import hashlib

import numpy as np

from moelab.data.joined import Tokens

TEXT = "text"  # the kind of `text_identity`; token ids name their tokenizer instead
CHUNK = 1 << 22  # tokens hashed together
_WEYL = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, the increment of splitmix64


def text_identity(text: str) -> int:
    """0 .. 2^64 - 1: the first 8 bytes of sha256 over the text in lower case, white space runs as one space."""
    normal = " ".join(text.lower().split())
    return int.from_bytes(hashlib.sha256(normal.encode("utf-8", "replace")).digest()[:8], "big")


def split_value(identity: int, split_seed: int) -> float:
    """0 .. 1, uniform over documents and independent between seeds; held out iff below `data.validation_fraction`."""
    digest = hashlib.sha256(f"split/{split_seed}/{identity:016x}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def token_kind(tokenizer: str, eos_token_id: int) -> str:
    """What hashes of token ids can be compared with: those under the same tokenizer (its fingerprint)."""
    return f"tokens of {tokenizer[:16]}, end {eos_token_id}"


def token_identities(tokens: Tokens, document_starts: np.ndarray, eos_token_id: int) -> np.ndarray:
    """tokens [N], document_starts [n + 1] -> [n] uint64 of the ids and their places; end-of-document ids don't count.

    The sum over a document of mixed (place, id) pairs modulo 2^64, so that pieces can be added up: 15 ns a token.
    """
    found = np.zeros(len(document_starts) - 1, np.uint64)
    for begin in range(0, len(tokens), CHUNK):
        ids = np.asarray(tokens[begin : begin + CHUNK]).astype(np.uint64)
        end = begin + len(ids)
        first, last = np.searchsorted(document_starts, [begin, end - 1], side="right") - 1
        starts = document_starts[first : last + 1]
        inside = np.maximum(starts, begin) - begin  # where each document begins in this piece
        lengths = np.diff(np.append(inside, len(ids)))
        place = np.arange(begin, end, dtype=np.int64) - np.repeat(starts, lengths)
        values = mix(mix(place.astype(np.uint64) * _WEYL + _WEYL) ^ ids)
        values[ids == eos_token_id] = 0
        found[first : last + 1] += np.add.reduceat(values, inside)
    return mix(found)


def mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): every output bit depends on every input bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
