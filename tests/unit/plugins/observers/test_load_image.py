"""The picture of expert load: its colours, its file, and what is written into it, read back pixel by pixel."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from moelab_plugins.observers._load_image import INK, Pixels, colour, load_image, png
from moelab_plugins.observers._pixel_font import text_mask, text_width


def holds(picture: Pixels, text: str, scale: int = 2) -> bool:
    """Whether `text` is drawn somewhere in the picture: ink where its letters are, none between them."""
    ink = (picture == np.array(INK, dtype=np.uint8)).all(axis=-1)
    mask = text_mask(text, scale)[:, : text_width(text, scale)]
    windows = np.lib.stride_tricks.sliding_window_view(ink, mask.shape)
    return bool((windows == mask).all(axis=(2, 3)).any())


def test_colours_mark_dead_fair_and_overloaded_experts() -> None:
    dead, fair, full, fuller = colour(np.array([0.0, 1.0, 4.0, 9.0]))
    assert dead.tolist() == [0, 0, 0]
    assert fair.min() > 220
    assert full.tolist() == fuller.tolist()
    assert full[0] > 3 * full[2]  # red


def test_png_is_what_pillow_reads() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels)


def test_the_picture_says_its_step_the_layers_the_experts_and_its_scale() -> None:
    picture = load_image({3: [1 / 8] * 8, 17: [0.5, 0.5, *[0.0] * 6]}, 1250)
    for words in ("step 1250", "17", "0", "7", "fullest dead", "dead", "4+", "1 = the fair share"):
        assert holds(picture, words), words
    assert holds(picture, "4.00x   6")  # layer 17: its fullest expert has 0.5 of 1/8, six have nothing
    assert holds(picture, "1.00x   0")
    assert not holds(picture, "4.00x   5")


@pytest.mark.parametrize("experts", [1, 2, 8, 64, 128, 256])
def test_every_expert_has_its_column_at_any_number_of_them(experts: int) -> None:
    """A cell of each colour in order: none hidden, none beyond the edge."""
    shares = np.linspace(0.5, 1.5, experts) / experts
    picture = load_image({0: list(shares)}, 1)
    colours = [tuple(rgb) for rgb in colour(shares * experts)]
    best = max(picture, key=lambda row: sum(tuple(pixel) in set(colours) for pixel in row))
    seen = [pixel for pixel in map(tuple, best) if pixel in set(colours)]
    assert list(dict.fromkeys(seen)) == list(dict.fromkeys(colours))


def test_deep_models_and_layers_of_different_widths_share_one_picture() -> None:
    deep = load_image({layer: [1 / 4] * 4 for layer in range(28)}, 1)
    assert all(holds(deep, f"{layer}") for layer in (0, 9, 27))
    assert deep.shape[0] < 700
    deeper = load_image({layer: [1 / 4] * 4 for layer in range(200)}, 1)
    assert holds(deeper, "199", scale=1)
    mixed = load_image({0: [1.0], 3: [0.25] * 4}, 1)
    assert mixed.shape == load_image({0: [0.25] * 4, 3: [0.25] * 4}, 1).shape


def test_every_letter_that_is_written_has_a_glyph_of_its_own() -> None:
    letters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:-+/=>"
    drawn = {text_mask(letter).tobytes() for letter in letters}
    assert len(drawn) == len(letters)
    assert text_mask("a").tobytes() == text_mask("A").tobytes()
    assert not text_mask(" é").any()  # what is not drawn is a blank, not an error
