"""Formats: rounding and the search for NaN, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moelab_upcycling.dtypes import STORAGE, all_finite, from_float32, scaled, to_float32

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def as_numpy(values: torch.Tensor) -> np.ndarray:
    return values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy()


@pytest.mark.parametrize("dtype", list(STORAGE))
def test_rounding_is_torchs(dtype: str):
    values = torch.randn(100_000) * 10.0 ** torch.randint(-4, 4, (100_000,))
    assert np.array_equal(from_float32(values.numpy(), dtype), as_numpy(values.to(TORCH[dtype])))


def test_ties_round_to_even():
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8], dtype=np.float32)
    assert to_float32(from_float32(ties, "BF16"), "BF16").tolist() == [1.0, 1 + 2**-6]


@pytest.mark.parametrize("dtype", list(STORAGE))
@pytest.mark.parametrize("factor", [2.0, 0.5, 7.4, 1e-3])
def test_scaling_multiplies_in_float32_and_rounds_once(dtype: str, factor: float):
    values = torch.randn(300, 200).to(TORCH[dtype])
    expected = (values.float() * torch.tensor(factor, dtype=torch.float32)).to(TORCH[dtype])
    assert np.array_equal(scaled(as_numpy(values), dtype, factor), as_numpy(expected))


def test_silence_is_plus_zero():
    assert np.array_equal(scaled(as_numpy(-torch.ones(4, 4, dtype=torch.bfloat16)), "BF16", 0.0), np.zeros((4, 4)))


@pytest.mark.parametrize("dtype", list(STORAGE))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_single_bad_value_is_found(dtype: str, bad: float):
    values = torch.randn(500, 400).to(TORCH[dtype])
    assert all_finite(as_numpy(values), dtype)
    values[317, 211] = bad
    assert not all_finite(as_numpy(values), dtype)
