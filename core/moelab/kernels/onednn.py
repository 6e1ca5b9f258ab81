"""fp32 products on a CPU by oneDNN, which torch uses for bf16 only: where they are faster than MKL's.

oneDNN compiles a kernel for every new shape (0.2 ms), and takes a matrix whose rows lie apart by another way that is a
thousand times as slow (benchmarks/products.py). So its right operand is always dense here, and who multiplies ever new
numbers of rows rounds them up.
T rows, D columns, N outputs.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from moelab.processor import cpu_lines

ZEN_5 = 26  # AMD's family number; the first whose registers for AVX-512 are whole
LEAST_FLOPS = 1e8  # of one product; below, MKL's are as fast
LEAST_FLOPS_WIDER = 3e7  # where its vectors are wider than MKL's
ALONE_ROWS, ALONE_FLOPS = 32, 4e6  # an expert's, and of its down product: multiplied alone from there on, where wider
LEAST_UNIT, SIZES = 16, 8  # numbers of rows that are rounded up: multiples of at least so much, so many an octave
PLAIN = (Tensor, nn.Parameter)


@cache
def onednn_is_wider() -> bool:
    """Whether oneDNN's fp32 products use vectors twice as wide as MKL's.

    On AMD's processors MKL keeps to AVX2. Forward and backward a linear layer of 2048 x 2048 takes 2,048 tokens in half
    of MKL's time on two cores of Zen 5 (benchmarks/cpu_parts.py). Zen 4, which computes AVX-512 in two halves, gained a
    tenth at most.
    """
    lines = cpu_lines()
    family = lines.get("cpu family", "")
    return (
        lines.get("vendor_id") == "AuthenticAMD"
        and family.isdecimal()
        and int(family) >= ZEN_5
        and "avx512f" in lines.get("flags", "").split()
        and torch.backends.mkldnn.is_available()
    )


def prefers_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `product` is the faster way to x [..., D] weight^T + bias, of weight [N, D]."""
    if not onednn_serves(x, weight, bias):  # first: torch.compile can't trace what looks at the processor
        return False
    return 2 * x.numel() * len(weight) >= (LEAST_FLOPS_WIDER if onednn_is_wider() else LEAST_FLOPS)


def onednn_serves(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> bool:
    """Whether `product` may compute x [..., D] weight^T + bias, of weight [N, D]; None: of one that fits x."""
    return (
        not torch.compiler.is_compiling()  # first: it can't trace the others
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and is_plain(*(one for one in (x, weight, bias) if one is not None))
        and (weight is None or _fits(x, weight, bias))
        and not torch.is_autocast_enabled("cpu")
        and may_use_onednn()
    )


def is_plain(*tensors: Tensor) -> bool:
    """Whether they are torch's own, and nothing but autograd follows what is computed of them.

    Subclasses (fake, distributed, quantized) know torch's operations, not oneDNN's. So do torch.func, forward-mode
    derivatives, jit.trace, and dispatch modes: a counter of FLOPs would see none.
    """
    return (
        not torch.compiler.is_compiling()
        and all(type(one) in PLAIN and one.layout == torch.strided for one in tensors)
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def may_use_onednn() -> bool:
    """Whether this torch has oneDNN, and `torch.backends.mkldnn.enabled` has not been turned off."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """What doesn't is torch's, to refuse in its words: oneDNN names a primitive that it can't create."""
    return (
        x.shape[-1:] == weight.shape[1:]
        and (bias is None or bias.shape == weight.shape[:1])
        and all(one is None or (one.dtype == x.dtype and one.device == x.device) for one in (weight, bias))
    )


def alone_from(numbers: int) -> float:
    """Rows from which an expert in fp32, its down matrix of so many numbers, is multiplied by oneDNN, alone."""
    return max(ALONE_ROWS, ALONE_FLOPS / (2 * numbers)) if onednn_is_wider() else math.inf


def round_up(count: int) -> int:
    """Rows, up to a number that comes again: 6 % more on average.

    With the experts' ever new counts compiling took three times as long as the products in bf16.
    """
    step = max(LEAST_UNIT, (1 << max(0, count.bit_length() - 1)) // SIZES)
    return -(-count // step) * step


def rounded_sizes(least: float, most: int) -> list[int]:
    """All that `round_up` makes of `least` to `most` rows."""
    found: list[int] = []
    while least <= most:
        found.append(round_up(math.ceil(least)))
        least = found[-1] + 1
    return found


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, D], weight [N, D] -> x weight^T + bias [T, N]. No gradient."""
    dense = weight if is_dense(weight) else weight.contiguous()
    out: Tensor = pointwise().default(x, dense, dense_bias(bias), "none", [], "")
    return out


def outer(rows: Tensor, others: Tensor) -> Tensor:
    """rows [T, N], others [T, D] -> rows^T others [N, D]. No gradient.

    torch lays the first operand anew, by one thread, and who takes a result that lies turned does so with that. So the
    narrower one comes first where fewer numbers are laid anew (benchmarks/products.py): the result may lie turned.
    """
    (count, outputs), columns = rows.shape, others.shape[1]
    if (count + outputs) * columns < count * outputs:
        return product(others.t(), rows.t()).t()
    return product(rows.t(), others.t())


def is_dense(matrix: Tensor) -> bool:
    """Whether its rows or its columns lie side by side without gaps."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def dense_bias(bias: Tensor | None) -> Tensor | None:
    """As `pointwise` must have it: it reads whatever lies between the numbers of one with gaps."""
    return None if bias is None else bias.contiguous()


@cache
def pointwise() -> Any:
    """oneDNN's product. Looked up through torch.ops, each time, it takes as long as another small operation."""
    return torch.ops.mkldnn._linear_pointwise
