"""Products of a few rows with a matrix, without gradients: what a token of generation mostly consists of.

They cost what the matrix takes to read, where a kernel reads it as fast as memory gives it. MKL's matrix-vector product
does not on AMD's processors (12 GB/s on a Zen core where a sum reads 32), and its matrix product does not for few rows;
with the matrix on the left and two to eight columns on the right it reads 20 to 24, and for more rows oneDNN takes 0.6
to 0.8 of its time. Where many products come, oneDNN reads a copy of the matrix in its own order (`PackedWeights`): from
2^20 elements on in 0.35 to 0.85 of the best of these, for any number of rows; smaller ones for 3 rows or more. On
others' it was not measured, and `nn.functional.linear` is used. Decided by the processor's maker and by sizes, so that
a machine always rounds alike.
M rows, D columns, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

MOST_ROWS = 8
LEAST_ELEMENTS = 1 << 15  # of the matrix; below, it is the call that takes time
PACKED_ROWS = 16  # that the order of a copy is chosen for; others' differ by less than a measurement does
_PACKED: ContextVar[Mapping[int, Tensor]] = ContextVar("packed", default={})  # noqa: B039 - never written to


def thin_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether `thin_product` is the faster way for x [..., D] and weight [N, D]."""
    return x.numel() <= MOST_ROWS * weight.shape[1] and _ours(x, weight)


def _ours(x: Tensor, weight: Tensor) -> bool:
    """Whether there is something to choose."""
    return (
        not torch.is_grad_enabled()
        and x.numel() > 0
        and x.dtype == torch.float32
        and not isinstance(x, FakeTensor)
        and _suits(weight)
    )


def _suits(weight: Tensor) -> bool:
    """Whether products with it were measured."""
    return (
        weight.numel() >= LEAST_ELEMENTS
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and reads_matrices_faster()
        and not torch.is_autocast_enabled("cpu")
        and not isinstance(weight, FakeTensor)
        and not torch.compiler.is_compiling()
    )


class PackedWeights:
    """Copies of matrices in oneDNN's own order, as they are now; made in the time of four to six products each.

    Within `used`, `few_product` reads these in place of their originals, known by identity.
    """

    def __init__(self, weights: Iterable[Tensor], most_bytes: int) -> None:
        """Of the first that fit in `most_bytes`; of none where a copy is of no use (see `_suits`)."""
        self._originals: list[Tensor] = []  # alive, so that no other takes their identity
        self._copies: dict[int, Tensor] = {}
        for weight in weights:
            size = weight.numel() * weight.element_size()
            plain = type(weight) in (Tensor, nn.Parameter) and weight.is_contiguous() and _suits(weight)
            if not plain or size > most_bytes or id(weight) in self._copies or not torch.backends.mkldnn.is_available():
                continue
            most_bytes -= size
            self._originals.append(weight)
            self._copies[id(weight)] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)

    @contextmanager
    def used(self) -> Iterator[None]:
        token = _PACKED.set(self._copies)
        try:
            yield
        finally:
            _PACKED.reset(token)


def packed(weight: Tensor) -> Tensor | None:
    """Its copy, within `PackedWeights.used` and where nothing is to be differentiated."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return _PACKED.get().get(id(weight))


def thin_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., D], weight [N, D] -> x weight^T + bias, [..., N]."""
    rows = x.reshape(-1, weight.shape[1])
    out = left_product(rows, weight).t()[: len(rows)].contiguous()
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], weight.shape[0])


def left_product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [M, D], weight [N, D] -> weight rows^T, [N, max(M, 2)]: one row is there twice, since one column is slow."""
    return torch.mm(weight, (torch.cat([rows, rows]) if len(rows) == 1 else rows).t())


def few_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., D], weight [N, D] -> x weight^T + bias [..., N], the faster way."""
    copied = packed(weight)
    if copied is not None and x.dtype == torch.float32 and x.numel() > 0:
        return _onednn(x, copied, bias, len(weight))
    if thin_pays(x, weight):
        return thin_product(x, weight, bias)
    if not _ours(x, weight) or not torch.backends.mkldnn.is_available():
        return nn.functional.linear(x, weight, bias)
    return _onednn(x, weight, bias, len(weight))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out.view(*x.shape[:-1], outputs)


@cache
def reads_matrices_faster() -> bool:
    """Whether this is a processor on which MKL reads a matrix faster in a product with a matrix than with a vector."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()[:4096]
    except OSError:  # not Linux
        return False
