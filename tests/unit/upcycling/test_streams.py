"""Random streams: stable, independent, and the table of normals."""

from __future__ import annotations

import numpy as np
import pytest

from moelab_upcycling.streams import choose, fill, normal_table, normals, permutation, stream, unit_quantiles

GOLDEN = [15397414245590227019, 17302862383023273312, 12742828340393614019]  # numpy 2.4


def test_a_stream_is_pinned():
    """numpy promises PCG64's bits; a change here changes every checkpoint ever made."""
    raw = stream(0, "experts/qwen2/1", 3, "redraw", expert=5, matrix="down").random_raw(3)
    assert [int(word) for word in raw] == GOLDEN


@pytest.mark.parametrize(
    "other",
    [
        (1, "a/1", 0, "r", 0, "gate"),
        (0, "a/2", 0, "r", 0, "gate"),
        (0, "a/1", 1, "r", 0, "gate"),
        (0, "a/1", 0, "s", 0, "gate"),
        (0, "a/1", 0, "r", 1, "gate"),
        (0, "a/1", 0, "r", 0, "up"),
    ],
)
def test_each_part_of_the_key_gives_another_stream(other: tuple):
    def draw(seed: int, algorithm: str, layer: int, role: str, expert: int, matrix: str) -> np.ndarray:
        return stream(seed, algorithm, layer, role, expert=expert, matrix=matrix).random_raw(64)

    assert not np.any(draw(0, "a/1", 0, "r", 0, "gate") == draw(*other))


def test_a_permutation_holds_each_number_once():
    assert sorted(permutation(stream(0, "a", 0, "p"), 1000).tolist()) == list(range(1000))
    assert choose(stream(0, "a", 0, "p"), 1000, 137).sum() == 137


def test_the_quantile_table_is_a_standard_normal():
    z = unit_quantiles()
    assert len(z) == 65536
    assert abs(z.mean()) < 1e-15
    assert abs((z**2).mean() - 1) < 1e-12
    assert abs((z**4).mean() - 2.9992) < 1e-4  # 3 for a normal; its tails end at 4.32
    assert 4.31 < z[-1] < 4.33


@pytest.mark.parametrize("shape", [(10, 1), (10, 3), (10, 3584), (7, 13001), (3, 32768), (1, 40000), (0, 5)])
def test_values_are_drawn_as_one_sequence_whatever_their_number(shape: tuple[int, int]):
    table = normal_table(0.1, 0.5, "F32")
    out = np.full(shape, np.float32(99))
    fill(stream(0, "a", 0, "x"), table, out)
    raw = stream(0, "a", 0, "x").random_raw(-(-out.size // 4)).view(np.uint16)[: out.size]
    assert np.array_equal(out, table[raw].reshape(shape))


def test_bfloat16_draws_are_the_rounded_float32_draws():
    exact = normals(stream(0, "a", 0, "x"), (64, 64), 0.0, 0.02, "F32")
    bits = normals(stream(0, "a", 0, "x"), (64, 64), 0.0, 0.02, "BF16")
    rounded = (bits.astype(np.uint32) << 16).view(np.float32)
    assert np.max(np.abs(rounded - exact) / np.maximum(np.abs(exact), 1e-30)) <= 2**-8
