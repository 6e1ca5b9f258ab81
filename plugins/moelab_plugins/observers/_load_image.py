"""Expert load as a picture: one row a layer, one column an expert, colours fixed so that runs can be compared.

It says what it shows: layers and experts are numbered, beside each row stands its fullest expert and how many got
nothing, and below it the scale.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moelab_plugins.observers._pixel_font import HEIGHT, text_mask, text_width

Pixels = NDArray[np.uint8]

FAIR_SHARES = 4.0  # the end of the scale
SCALE = np.array([0.0, 0.5, 1.0, 2.0, FAIR_SHARES])
COLOURS = np.array([[28, 50, 125], [120, 160, 215], [232, 232, 228], [240, 150, 60], [140, 10, 25]], dtype=np.float64)
DEAD, BACKGROUND, INK, GAP = (0, 0, 0), (255, 255, 255), (60, 60, 60), 1
# TensorBoard shows a picture about 400 pixels wide; twice the font is still read when it is made half as large.
GRID, CELL, ROW_HEIGHT = 384, (2, 32), (18, 32)
SMALL_ROW, MANY_LAYERS = 9, 48  # of deeper models, whose numbers are written small
MARGIN, LINE, STRIP, LEAST_WIDTH = 8, 20, 14, 450


def load_image(loads: Mapping[int, list[float]], step: int) -> Pixels:
    """{layer: [E] shares} at `step` -> [height, width, 3]."""
    layers = sorted(loads)
    most = max(len(shares) for shares in loads.values())
    cell = int(np.clip(GRID // most, *CELL))
    row = SMALL_ROW if len(layers) > MANY_LAYERS else int(np.clip(320 // len(layers), *ROW_HEIGHT))
    font = 1 if row < ROW_HEIGHT[0] else 2
    left = MARGIN + max(text_width(f"{layer}", font) for layer in layers) + MARGIN
    right = left + cell * most + MARGIN
    top = MARGIN + 2 * LINE
    width = max(right + text_width("fullest dead", 2) + MARGIN, LEAST_WIDTH)
    pixels = np.full((top + row * len(layers) + 3 * LINE + MARGIN, width, 3), BACKGROUND, dtype=np.uint8)
    _write(pixels, f"step {step}: layers by experts", MARGIN, MARGIN)
    _expert_numbers(pixels, most, cell, left)
    _write(pixels, "fullest dead", right, MARGIN + LINE)
    for place, layer in enumerate(layers):
        multiple = np.asarray(loads[layer]) * len(loads[layer])
        _layer(pixels, multiple, (left, top + place * row), (cell, row))
        middle = top + place * row + (row - GAP - font * HEIGHT) // 2
        _write(pixels, f"{layer}", left - MARGIN - text_width(f"{layer}", font), middle, font)
        _write(pixels, f"{_times(multiple.max()):<8}{np.count_nonzero(multiple == 0)}", right, middle, font)
    _legend(pixels, top + row * len(layers) + MARGIN)
    return pixels


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


def _times(multiple: float) -> str:
    """How many fair shares: `6.46x`, `128x`."""
    return f"{multiple:.2f}x" if multiple < 10 else f"{multiple:.0f}x"


def _layer(pixels: Pixels, multiple: NDArray[np.float64], corner: tuple[int, int], size: tuple[int, int]) -> None:
    """multiple [E]: one cell an expert, with a white gap below, and to its right where there is room."""
    (x, y), (cell, row) = corner, size
    gap = GAP if cell > CELL[0] + 1 else 0
    for expert, rgb in enumerate(colour(multiple)):
        pixels[y : y + row - GAP, x + expert * cell : x + (expert + 1) * cell - gap] = rgb


def _expert_numbers(pixels: Pixels, most: int, cell: int, left: int) -> None:
    """Above the columns: 0 and every n-th, so that no two meet."""
    room = text_width(f"{most - 1}", 2) + 2 * MARGIN
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, *range(128, 10**6, 128)) if n * cell >= room or n >= most)
    for expert in range(0, most, every):
        label = f"{expert}"
        _write(pixels, label, left + expert * cell + (cell - text_width(label, 2)) // 2, MARGIN + LINE)


def _legend(pixels: Pixels, top: int) -> None:
    """A black box for dead; the scale from 0 to FAIR_SHARES with its numbers; what they are."""
    box = 2 * STRIP
    pixels[top : top + STRIP, MARGIN : MARGIN + box] = DEAD
    _write(pixels, "dead", MARGIN, top + LINE - 2)
    begin = MARGIN + text_width("dead", 2) + 3 * MARGIN
    end = pixels.shape[1] - MARGIN - text_width("+", 2) - MARGIN
    pixels[top : top + STRIP, begin:end] = colour(np.linspace(1e-9, FAIR_SHARES, end - begin))
    for tick in range(int(FAIR_SHARES) + 1):
        column = begin + round(tick / FAIR_SHARES * (end - begin - 2))
        pixels[top + STRIP : top + STRIP + 3, column : column + 2] = INK
        label = f"{tick}+" if tick == FAIR_SHARES else f"{tick}"
        _write(pixels, label, column - text_width(f"{tick}", 2) // 2, top + LINE - 2)
    _write(pixels, "tokens, 1 = the fair share", begin, top + 2 * LINE - 2)


def _write(pixels: Pixels, text: str, x: int, y: int, scale: int = 2) -> None:
    """`text` with its top left corner at (x, y); what lies outside of the picture is cut off."""
    x = max(x, 0)
    mask = text_mask(text, scale)[: max(pixels.shape[0] - y, 0), : max(pixels.shape[1] - x, 0)]
    pixels[y : y + mask.shape[0], x : x + mask.shape[1]][mask] = INK


def _chunk(kind: bytes, body: Any) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
