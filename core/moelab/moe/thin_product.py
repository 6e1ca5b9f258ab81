"""Products of a few rows with a matrix, without gradients: what a token of generation mostly consists of.

They cost what the matrix takes to read, where a kernel reads it as fast as memory gives it. MKL's matrix-vector product
does not on AMD's processors (12 GB/s on a Zen core where a sum reads 32), and its matrix product does not for few rows;
with the matrix on the left and two to eight columns on the right it reads 20 to 24, and for more rows oneDNN takes 0.6
to 0.8 of its time. On others' it was not measured, and `nn.functional.linear` is used. Decided by the processor's maker
and by sizes, so that a machine always rounds alike.
M rows, D columns, N outputs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

MOST_ROWS = 8
LEAST_ELEMENTS = 1 << 15  # of the matrix; below, it is the call that takes time


def thin_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether `thin_product` is the faster way for x [..., D] and weight [N, D]."""
    return x.numel() <= MOST_ROWS * weight.shape[1] and _ours(x, weight)


def _ours(x: Tensor, weight: Tensor) -> bool:
    """Whether there is something to choose."""
    return (
        not torch.is_grad_enabled()
        and x.numel() > 0
        and weight.numel() >= LEAST_ELEMENTS
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and reads_matrices_faster()
        and not torch.is_autocast_enabled("cpu")
        and not isinstance(x, FakeTensor)
        and not torch.compiler.is_compiling()
    )


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
    if thin_pays(x, weight):
        return thin_product(x, weight, bias)
    if not _ours(x, weight) or not torch.backends.mkldnn.is_available():
        return nn.functional.linear(x, weight, bias)
    rows = x.reshape(-1, weight.shape[1])
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out.view(*x.shape[:-1], weight.shape[0])


@cache
def reads_matrices_faster() -> bool:
    """Whether this is a processor on which MKL reads a matrix faster in a product with a matrix than with a vector."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()[:4096]
    except OSError:  # not Linux
        return False
