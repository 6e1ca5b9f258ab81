"""The float formats of checkpoints as numpy arrays; bfloat16, which numpy lacks, as its bits in uint16."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

STORAGE: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
SAFETENSORS_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


def to_float32(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Exact; any shape."""
    if dtype != "BF16":
        return values.astype(np.float32, copy=False)
    return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_float32(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """Rounded to nearest, ties to even; any shape, finite values only."""
    if dtype != "BF16":
        return values.astype(STORAGE[dtype], copy=False)
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def convert(values: npt.NDArray[Any], dtype: str, target: str) -> npt.NDArray[Any]:
    """The same numbers in another format; the very same array where nothing changes."""
    return values if dtype == target else from_float32(to_float32(values, dtype), target)


def scaled(values: npt.NDArray[Any], dtype: str, factor: float) -> npt.NDArray[Any]:
    """values * factor, multiplied in float32 and rounded once. Zero gives +0, whatever the sign."""
    if factor == 1:
        return values
    if factor == 0:
        return np.zeros_like(values)
    out = np.empty_like(values)
    if dtype == "BF16":  # there are only 65,536 values, so look the products up
        with np.errstate(all="ignore"):  # the table also holds infinities and NaN, which no checked value reaches
            every = to_float32(np.arange(1 << 16, dtype=np.uint16), dtype) * np.float32(factor)
        products, flat, result = from_float32(every, dtype), values.reshape(-1), out.reshape(-1)
        for start in range(0, flat.size, 32768):
            part = slice(start, start + 32768)
            products.take(flat[part], out=result[part], mode="wrap")
        return out
    rows = max(1, 32768 // max(1, values[0].size)) if values.ndim > 1 else values.size
    for start in range(0, len(values), rows):  # a piece at a time stays in cache
        piece = to_float32(values[start : start + rows], dtype) * np.float32(factor)
        out[start : start + rows] = from_float32(piece, dtype)
    return out


def raw_bytes(values: npt.NDArray[Any]) -> memoryview:
    """A contiguous array's memory as bytes."""
    return values.reshape(-1).view(np.uint8).data


def all_finite(values: npt.NDArray[Any], dtype: str) -> bool:
    """Whether no value is NaN or infinite, read from the exponent bits. Contiguous arrays."""
    bits = values.reshape(-1).view(np.uint32 if dtype == "F32" else np.uint16)
    limit = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[dtype]
    mask = bits.dtype.type(0x7FFFFFFF if dtype == "F32" else 0x7FFF)
    step = 1 << 16
    buffer = np.empty(min(step, bits.size), bits.dtype)
    for start in range(0, bits.size, step):
        piece = bits[start : start + step]
        part = np.bitwise_and(piece, mask, out=buffer[: piece.size])
        if part.max() >= limit:
            return False
    return True
