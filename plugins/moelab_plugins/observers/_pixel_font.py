"""Capitals and digits of 5 x 7 pixels, so that a picture can say what it shows without a library that draws text.

Drawn here. Pillow is no dependency of ours, and of TensorBoard's only in newer versions; its pictures of letters would
also differ from version to version, and tests compare pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, ADVANCE = 5, 7, 6

_ART = """
0123456789
.###. ..#.. .###. #####  ...#. ##### ..##. ##### .###. .###.
#...# .##.. #...# ....#  ..##. #.... .#... ....# #...# #...#
#..## ..#.. ....# ...#.  .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ...#. ..##.  #..#. ....# ####. ..#.. .###. .####
##..# ..#.. ..#.. ....#  ##### ....# #...# .#... #...# ....#
#...# ..#.. .#... #...#  ...#. #...# #...# .#... #...# ...#.
.###. .###. ##### .###.  ...#. .###. .###. .#... .###. .##..
ABCDEFGHIJKLM
.###. ####. .###. ####. ##### ##### .###. #...# .###. ..### #...# #.... #...#
#...# #...# #...# #...# #.... #.... #...# #...# ..#.. ...#. #..#. #.... ##.##
#...# #...# #.... #...# #.... #.... #.... #...# ..#.. ...#. #.#.. #.... #.#.#
##### ####. #.... #...# ####. ####. #.### ##### ..#.. ...#. ##... #.... #.#.#
#...# #...# #.... #...# #.... #.... #...# #...# ..#.. ...#. #.#.. #.... #...#
#...# #...# #...# #...# #.... #.... #...# #...# ..#.. #..#. #..#. #.... #...#
#...# ####. .###. ####. ##### #.... .###. #...# .###. .##.. #...# ##### #...#
NOPQRSTUVWXYZ
#...# .###. ####. .###. ####. .#### ##### #...# #...# #...# #...# #...# #####
##..# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# #...# #...# ....#
#.#.# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# .#.#. .#.#. ...#.
#..## #...# ####. #...# ####. .###. ..#.. #...# #...# #.#.# ..#.. ..#.. ..#..
#...# #...# #.... #.#.# #.#.. ....# ..#.. #...# #...# #.#.# .#.#. ..#.. .#...
#...# #...# #.... #..#. #..#. ....# ..#.. #...# .#.#. #.#.# #...# ..#.. #....
#...# .###. #.... .##.# #...# ####. ..#.. .###. ..#.. .#.#. #...# ..#.. #####
.,:-+/=>
..... ..... ..... ..... ..... ....# ..... .#...
..... ..... ..##. ..... ..#.. ...#. ..... ..#..
..... ..... ..##. ..... ..#.. ...#. ##### ...#.
..... ..... ..... ##### ##### ..#.. ..... ....#
..... ..##. ..##. ..... ..#.. .#... ##### ...#.
.##.. ..#.. ..##. ..... ..#.. .#... ..... ..#..
.##.. .#... ..... ..... ..... #.... ..... .#...
"""


def text_mask(text: str, scale: int = 1) -> NDArray[np.bool_]:
    """[7 scale, 6 scale · len(text)]: where ink is. Small letters become capitals; what has no glyph is a blank."""
    mask = np.zeros((HEIGHT, ADVANCE * len(text)), dtype=bool)
    for place, letter in enumerate(text.upper()):
        if letter in _GLYPHS:
            mask[:, place * ADVANCE : place * ADVANCE + WIDTH] = _GLYPHS[letter]
    return mask.repeat(scale, axis=0).repeat(scale, axis=1)


def text_width(text: str, scale: int = 1) -> int:
    """Pixels of `text`, without the gap after its last letter."""
    return max(scale * (ADVANCE * len(text) - (ADVANCE - WIDTH)), 0)


def _read(art: str) -> dict[str, NDArray[np.bool_]]:
    lines = art.split("\n")[1:-1]
    found = {}
    for first in range(0, len(lines), HEIGHT + 1):
        rows = [line.split() for line in lines[first + 1 : first + 1 + HEIGHT]]
        for place, letter in enumerate(lines[first]):
            found[letter] = np.array([[pixel == "#" for pixel in row[place]] for row in rows])
    return found


_GLYPHS = _read(_ART)
