"""MinHash: which documents share most of their word n-grams, without comparing all pairs.

Broder (1997): the share of equal entries of two signatures estimates the Jaccard similarity of two sets. Signatures are
cut into bands of rows (locality-sensitive hashing); documents that agree in a whole band are looked at, and one goes
where the estimate over the whole signature reaches the threshold. With 20 bands of 7 rows a pair of similarity J is
looked at with probability 1 - (1 - J^7)^20: 0.99 at 0.8, 0.15 at 0.5 (datatrove's default, 14 bands of 8: 0.92 at 0.8).

n documents, H = BANDS * ROWS entries a signature.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterator

import numpy as np

from moelab.data.identity import mix
from moelab.data.words import words as words_of
from moelab.seeds import derive_seed

BANDS, ROWS = 20, 7
SIZE = BANDS * ROWS  # H
WORDS = 5  # a shingle: so many words in a row
_MULTIPLIERS = np.array([derive_seed(0, "minhash", n) * 2 + 1 for n in range(SIZE)], np.uint64)
_TOGETHER = 4096  # shingles hashed at once
ROOM = 1 << 16  # signatures in memory at once


def signature(text: str) -> np.ndarray:
    """[H] uint32 of the text's shingles of words, in lower case; of all its words where there are fewer."""
    words = np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words_of(text)], np.uint64)
    if len(words) == 0:
        return np.zeros(SIZE, np.uint32)
    size = min(WORDS, len(words))
    shingles = np.zeros(len(words) - size + 1, np.uint64)
    for place in range(size):
        shingles = mix(shingles * np.uint64(31) + words[place : place + len(shingles)] + np.uint64(1))
    shingles = np.unique(shingles)
    least = np.full(SIZE, np.iinfo(np.uint64).max, np.uint64)
    for begin in range(0, len(shingles), _TOGETHER):
        hashed = mix(shingles[begin : begin + _TOGETHER, None] * _MULTIPLIERS)
        np.minimum(least, hashed.min(0), out=least)
    return (least >> np.uint64(32)).astype(np.uint32)


def near_copies(signatures: np.ndarray, threshold: float, alive: np.ndarray, *, among: int | None = None) -> np.ndarray:
    """signatures [n, H], may lie on disk; alive [n] bool -> [n] bool: which repeat one before them that is kept.

    Documents are gone through in order, so the first of a group stays, and so does one that is near to a dropped one
    alone: chains of small changes don't take all with them. `among`: none of the first so many is dropped, and others
    are compared with these alone.
    """
    dropped = np.zeros(len(signatures), bool)
    for number, (later, earlier) in enumerate(_ordered(_candidates(signatures, alive))):
        if number % _TOGETHER == 0:  # each looks at pages all over the disk
            release(signatures)
        if among is None:
            kept = [one for one in earlier if not dropped[one]]
        else:
            kept = [one for one in earlier if one < among <= later]
        if kept and (np.asarray(signatures[kept]) == signatures[later]).mean(1).max() >= threshold:
            dropped[later] = True
    return dropped


def _candidates(signatures: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """[pairs, 2] int64, (earlier, later), each once: neighbours in a bucket, and each with the bucket's first."""
    index = np.flatnonzero(alive)
    found = [np.zeros((0, 2), np.int64)]
    for band in range(BANDS):
        key = np.concatenate([_keys(signatures, part, band) for part in np.split(index, range(ROOM, len(index), ROOM))])
        order = np.argsort(key, kind="stable")
        same = np.flatnonzero(key[order][1:] == key[order][:-1]) + 1  # places with the key of the one before
        begins = np.flatnonzero(np.append(True, key[order][1:] != key[order][:-1]))
        first = begins[np.searchsorted(begins, same, side="right") - 1]
        pairs = [np.stack([index[order[one]], index[order[same]]], 1) for one in (same - 1, first)]
        found.append(np.unique(np.concatenate(pairs), axis=0))
    return np.unique(np.concatenate(found), axis=0)


def _keys(signatures: np.ndarray, index: np.ndarray, band: int) -> np.ndarray:
    """[m] uint64 of the documents `index`: equal where they agree in the whole band."""
    rows = np.asarray(signatures[index, band * ROWS : (band + 1) * ROWS]).astype(np.uint64)
    release(signatures)
    key = np.zeros(len(rows), np.uint64)
    for row in range(ROWS):
        key = mix(key * np.uint64(31) + rows[:, row] + np.uint64(1))
    return key


def release(array: np.ndarray) -> None:
    """Let go of what an array that lies on disk holds in memory; what was written to it stays written."""
    if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.base.madvise(mmap.MADV_DONTNEED)


def _ordered(pairs: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """(later, those before it) in the order of the later ones."""
    pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
    cuts = np.flatnonzero(np.diff(pairs[:, 1])) + 1
    for group in np.split(pairs, cuts) if len(pairs) else ():
        yield int(group[0, 1]), group[:, 0].tolist()
