"""Products by oneDNN: beside float64, however their operands lie, and which processors prefer them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moelab.kernels import onednn
from moelab.kernels.onednn import (
    onednn_is_wider,
    onednn_serves,
    outer,
    prefers_onednn,
    product,
    round_up,
    rounded_sizes,
)
from moelab.nn.linear import Linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")

ZEN_5 = {"vendor_id": "AuthenticAMD", "cpu family": "26", "flags": "fpu avx2 avx512f"}
LIE: dict[str, Callable[[Tensor], Tensor]] = {
    "in rows": lambda matrix: matrix.contiguous(),
    "in columns": lambda matrix: matrix.t().contiguous().t(),
    "with gaps": lambda matrix: torch.cat([matrix, matrix], 1)[:, : matrix.shape[1]],
    "in columns with gaps": lambda matrix: torch.cat([matrix, matrix]).t().contiguous()[:, : len(matrix)].t(),
}


@pytest.mark.parametrize("right", LIE)
@pytest.mark.parametrize("left", LIE)
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 3, 5), (40, 24, 8), (8, 16, 48)])
def test_products_are_those_of_float64_however_operands_lie(
    left: str, right: str, rows: int, columns: int, outputs: int
):
    x, weight = LIE[left](torch.randn(rows, columns)), LIE[right](torch.randn(outputs, columns))
    dy = LIE[right](torch.randn(rows, outputs))
    torch.testing.assert_close(product(x, weight).double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outer(dy, x).double(), dy.double().t() @ x.double(), rtol=1e-5, atol=1e-5)


def test_the_right_operand_never_has_gaps(monkeypatch: pytest.MonkeyPatch):
    """oneDNN would compute it a thousand times as slowly."""
    seen: list[Tensor] = []
    compute = onednn.pointwise().default

    def spy(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        seen.append(weight)
        return compute(x, weight, *rest)

    monkeypatch.setattr(onednn, "pointwise", lambda: SimpleNamespace(default=spy))
    for lie in LIE.values():
        product(torch.randn(4, 6), lie(torch.randn(8, 6)))
        outer(lie(torch.randn(6, 8)), lie(torch.randn(6, 4)))
        outer(lie(torch.randn(6, 4)), lie(torch.randn(6, 8)))
    assert len(seen) == 3 * len(LIE)
    assert all(weight.is_contiguous() or weight.t().is_contiguous() for weight in seen)


@pytest.mark.parametrize(
    ("lines", "wider"),
    [
        (ZEN_5, True),
        (ZEN_5 | {"cpu family": "27"}, True),
        (ZEN_5 | {"cpu family": "25"}, False),  # Zen 4: AVX-512 in two halves
        (ZEN_5 | {"flags": "fpu avx2"}, False),  # a hypervisor may hide it
        (ZEN_5 | {"vendor_id": "GenuineIntel"}, False),  # whose MKL uses it
        (ZEN_5 | {"cpu family": "unknown"}, False),
        ({}, False),  # not Linux, not x86
    ],
)
def test_whose_vectors_onednn_uses_better_than_mkl(
    lines: Mapping[str, str], wider: bool, processor: Callable[[Mapping[str, str]], None]
):
    processor(lines)
    assert onednn_is_wider() is wider
    assert prefers_onednn(torch.empty(512, 256), torch.empty(256, 256)) is wider  # 67 MFLOP
    assert prefers_onednn(torch.empty(4096, 256), torch.empty(512, 256))
    assert not prefers_onednn(torch.empty(16, 64), torch.empty(64, 64))


def test_what_it_does_not_serve():
    assert onednn_serves(torch.empty(2, 2))
    assert not onednn_serves(torch.empty(2, 2, dtype=torch.float64))
    assert not onednn_serves(torch.empty(2, 2, dtype=torch.bfloat16))
    assert not onednn_serves(torch.empty(2, 2, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn_serves(torch.empty(2, 2))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn_serves(torch.empty(2, 2))


@pytest.mark.parametrize("lie", [lambda bias: bias[::3], lambda bias: bias[:1].expand(8), lambda bias: bias[5:13]])
def test_a_bias_is_read_where_its_numbers_lie(lie: Callable[[Tensor], Tensor]):
    x, weight, bias = torch.randn(4, 6), torch.randn(8, 6), lie(torch.randn(24))
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(product(x, weight, bias).double(), exact, rtol=1e-5, atol=1e-5)


UNFIT: dict[str, tuple[Tensor, Tensor | None]] = {
    "a weight of other columns": (torch.ones(5, 7), None),
    "a weight of another dtype": (torch.ones(5, 6).double(), None),
    "a bias of another size": (torch.ones(5, 6), torch.ones(4)),
    "a bias of another dtype": (torch.ones(5, 6), torch.ones(5).double()),
    "a bias without numbers": (torch.ones(5, 6), torch.ones(5, device="meta")),
}


@pytest.mark.usefixtures("zen_5")
@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_refused_in_torchs_words(name: str, monkeypatch: pytest.MonkeyPatch):
    """oneDNN names a primitive that it can't create."""
    monkeypatch.setattr(onednn, "LEAST_FLOPS_WIDER", 0)
    weight, bias = UNFIT[name]
    refused = []
    for kind in (Linear, torch.nn.Linear):
        layer = kind(6, 5)
        layer.weight, layer.bias = torch.nn.Parameter(weight), None if bias is None else torch.nn.Parameter(bias)
        with pytest.raises(RuntimeError) as told:
            layer(torch.ones(3, 6))
        refused.append(str(told.value))
    assert refused[0] == refused[1]


@pytest.mark.parametrize(("least", "most"), [(61.04, 2048), (32, 500), (1, 17), (90, 80), (float("inf"), 10**9)])
def test_sizes_between_are_those_that_rows_are_rounded_to(least: float, most: int) -> None:
    rows = () if least > most else range(math.ceil(least), most + 1)
    assert rounded_sizes(least, most) == sorted({round_up(count) for count in rows})
