"""Expert load as a picture: one row a layer, one column an expert, colours fixed so that runs can be compared."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

LEGEND = """**moe/expert_load** (Images tab): one row for each MoE layer, the first on top; one column for each expert.
The colour is the expert's share of the assignments in the logged step, in units of the fair share 1/E:

| colour | share |
|---|---|
| black | none: the expert is dead |
| dark blue | almost none |
| light grey | 1, the fair share |
| orange | 2 times the fair share |
| dark red | 4 times the fair share or more |

The strip below is the scale from 0 (left) to 4 (right), with a tick at each whole number.
A healthy image is light grey all over; a bright column on dark rows is a collapsed router."""

FAIR_SHARES = 4.0  # the end of the scale
SCALE = np.array([0.0, 0.5, 1.0, 2.0, FAIR_SHARES])
COLOURS = np.array([[28, 50, 125], [120, 160, 215], [232, 232, 228], [240, 150, 60], [140, 10, 25]], dtype=np.float64)
DEAD, BACKGROUND, GAP = (0, 0, 0), (255, 255, 255), 1
WIDTH, ROW_HEIGHT, STRIP = 960, (14, 64), 20


def load_image(loads: Mapping[int, list[float]]) -> Pixels:
    """{layer: [E] shares} -> [height, width, 3], about a thousand pixels wide whatever E is."""
    most = max(len(shares) for shares in loads.values())
    cell = max(4, WIDTH // most)
    height = int(np.clip(400 // len(loads), *ROW_HEIGHT))
    rows = [_row(np.asarray(shares) * len(shares), cell, height, most) for _, shares in sorted(loads.items())]
    return np.concatenate([*rows, _scale_strip(cell * most)])


def colour(multiple: NDArray[np.float64]) -> Pixels:
    """[...] multiples of the fair share -> [..., 3]."""
    clipped = np.clip(multiple, 0, FAIR_SHARES)
    rgb = np.stack([np.interp(clipped, SCALE, COLOURS[:, channel]) for channel in range(3)], axis=-1)
    rgb[multiple == 0] = DEAD
    return rgb.round().astype(np.uint8)


def png(pixels: Pixels) -> bytes:
    """[height, width, 3] uint8 -> a PNG file; 8-bit RGB, no filter (PNG specification, 11.2)."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, width * 3)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(rows.tobytes(), 6)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _row(multiple: NDArray[np.float64], cell: int, height: int, most: int) -> Pixels:
    """One layer, with a white gap below and to the right of each expert."""
    pixels = np.full((height, cell * most, 3), BACKGROUND, dtype=np.uint8)
    for expert, rgb in enumerate(colour(multiple)):
        pixels[: height - GAP, expert * cell : (expert + 1) * cell - GAP] = rgb
    return pixels


def _scale_strip(width: int) -> Pixels:
    """The colours from 0 to FAIR_SHARES, under a white margin, with black ticks at whole numbers."""
    scale = colour(np.linspace(1e-9, FAIR_SHARES, width))
    strip = np.full((STRIP + 10, width, 3), BACKGROUND, dtype=np.uint8)
    strip[10:, :] = scale
    for tick in range(int(FAIR_SHARES) + 1):
        column = min(width - 2, round(tick / FAIR_SHARES * width))
        strip[10 : 10 + STRIP // 2, column : column + 2] = DEAD
    return strip


def _chunk(kind: bytes, body: Any) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
