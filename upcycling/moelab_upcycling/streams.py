"""Randomness of upcycling: a stream for each purpose, the same bits on every machine and numpy version.

Only `random_raw` of PCG64 is used, which numpy promises to keep (NEP 19; its distributions it does not).
Permutations are stable sorts of raw keys. Normals are looked up in a table of 65,536 quantiles by 16 raw bits:
the table has mean 0 and variance 1 exactly, and is finer than bfloat16 itself at the usual 0.02.
"""

from __future__ import annotations

import hashlib
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab_upcycling.dtypes import STORAGE, from_float32

QUANTILES = 1 << 16
_CHUNK = 32768  # values drawn at a time, whole words: those, indices and results stay in the second-level cache


def stream(
    seed: int, algorithm: str, layer_id: int, role: str, *, expert: int = 0, matrix: str = ""
) -> np.random.PCG64:
    """The stream of one purpose. `algorithm` carries its version, such as "experts/qwen2/1"."""
    key = (_word(algorithm), layer_id, _word(role), expert, _word(matrix))
    return np.random.PCG64(np.random.SeedSequence(entropy=seed, spawn_key=key))


def permutation(source: np.random.PCG64, size: int) -> npt.NDArray[np.int32]:
    """-> [size], a uniform permutation."""
    return np.argsort(source.random_raw(size), kind="stable").astype(np.int32)


def choose(source: np.random.PCG64, size: int, count: int) -> npt.NDArray[np.bool_]:
    """-> [size], true in exactly `count` places."""
    mask = np.zeros(size, dtype=bool)
    mask[permutation(source, size)[:count]] = True
    return mask


@cache
def unit_quantiles() -> npt.NDArray[np.float64]:
    """-> [65536], ascending: the standard normal's quantiles at (i + 1/2) / 65536, rescaled to variance 1."""
    normal = NormalDist()
    upper = np.array([normal.inv_cdf((i + 0.5) / QUANTILES) for i in range(QUANTILES // 2, QUANTILES)])
    values = np.concatenate([-upper[::-1], upper])  # exactly symmetric, so the mean is exactly 0
    values /= np.sqrt(np.mean(values * values))
    values.setflags(write=False)
    return values


def normal_table(mean: float, std: float, dtype: str) -> npt.NDArray[Any]:
    """-> [65536] in the storage type of `dtype`: every value that a draw of N(mean, std^2) can take."""
    # mean and std to float32 first: in which order they were summed can't reach the table.
    values = np.float64(np.float32(mean)) + np.float64(np.float32(std)) * unit_quantiles()
    return from_float32(values.astype(np.float32), dtype)


def fill(source: np.random.PCG64, table: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
    """Draw every value of a contiguous `out` in its order, one 16-bit index a value."""
    flat = out.reshape(-1)
    index = np.empty(min(_CHUNK, flat.size), dtype=np.intp)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        chosen = index[: part.size]
        raw = source.random_raw(-(-part.size // 4)).astype("<u8", copy=False)
        chosen[:] = raw.view("<u2")[: part.size]
        # No index is out of bounds; of the modes that needn't ask, "wrap" costs two thirds of "clip".
        table.take(chosen, out=part, mode="wrap")


def normals(source: np.random.PCG64, shape: tuple[int, int], mean: float, std: float, dtype: str) -> npt.NDArray[Any]:
    """-> shape, in the storage type of `dtype`."""
    out = np.empty(shape, dtype=STORAGE[dtype])
    fill(source, normal_table(mean, std, dtype), out)
    return out


def uniforms(source: np.random.PCG64, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    """-> shape, in [0, 1), multiples of 2^-53."""
    raw = source.random_raw(shape[0] * shape[1])
    return ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)


@cache
def _word(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
