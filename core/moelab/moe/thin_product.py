"""Products of a few rows with a matrix, without gradients: what a token of generation mostly consists of.

They cost what the matrix takes to read, where a kernel reads it as fast as memory gives it; small ones, the call.
Measured on AMD's processors (Zen 5, one core, other weights read in between):

- MKL is quickest for up to 8 rows and 2^20 elements; else oneDNN takes 0.5 to 1.0 of its time.
- Where many products come, a copy pays (`PackedWeights`). Of one row: the matrix turned, in 0.75 to 0.85 of that; from
  2^21 elements on as four bags of its rows (embedding_bag), which read 4864 x 896 at 73 GB/s where MKL and oneDNN read
  17 to 23. Of more rows: oneDNN's own order, 0.7 to 1.0 of the best of the others, from 3 rows on.

On others' it was not measured, and `nn.functional.linear` is used. Decided by the processor's maker and by sizes, so
that a machine always rounds alike.
M rows, D columns, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

MOST_ROWS = 8  # that MKL is quicker for ...
MOST_ELEMENTS = 1 << 20  # ... of a matrix smaller than that
LEAST_ELEMENTS = 1 << 15  # of the matrix; below, it is the call that takes time
BAGGED_ELEMENTS = 1 << 21  # of a turned copy: from here as so many bags
BAGS = 4
PACKED_ROWS = 16  # that the order of a copy is chosen for; others' differ by less than a measurement does


def _ours(x: Tensor, weight: Tensor) -> bool:
    """Whether there is something to choose."""
    return (
        not torch.is_grad_enabled()
        and x.numel() > 0
        and x.dtype == torch.float32
        and not isinstance(x, FakeTensor)
        and _suits(weight)
    )


def _suits(*weights: Tensor) -> bool:
    """Whether products with them, read as one, were measured."""
    return (
        sum(weight.numel() for weight in weights) >= LEAST_ELEMENTS
        and all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in weights)
        and reads_matrices_faster()
        and not torch.is_autocast_enabled("cpu")
        and not any(isinstance(weight, FakeTensor) for weight in weights)
        and not torch.compiler.is_compiling()
    )


@dataclass
class _Copy:
    """Of matrices that read the same rows, with their product with the rows that came last."""

    read: Tensor
    ends: dict[int, tuple[int, int]]  # a matrix, by its identity -> its columns of the product
    rows: Tensor | None = None
    product: Tensor | None = None

    def part(self, x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None = None) -> Tensor:
        """x [..., D], weights that stand beside each other -> [..., n]."""
        if len(self.ends) == 1:
            return _from_copy(x, self.read, bias)
        if self.rows is not x or self.product is None:
            self.rows, self.product = x, _from_copy(x, self.read, None)
        begin, end = self.ends[id(weights[0])][0], self.ends[id(weights[-1])][1]
        found = self.product[..., begin:end]
        return found if bias is None else found + bias


_PACKED: ContextVar[Mapping[int, _Copy]] = ContextVar("packed", default={})  # noqa: B039 - never written to


class PackedWeights:
    """Copies of matrices as products of few rows read them best, as they are now: made in the time of 4 to 40 products.

    Within `used`, `few_product` and `joined_product` read these in place of their originals, known by identity.
    """

    def __init__(self, weights: Iterable[tuple[Tensor, ...]], most_bytes: int, rows: int = PACKED_ROWS) -> None:
        """Of the first that fit in `most_bytes`; of none where a copy is of no use (see `_suits`).

        weights: each alone, or those that read the same rows together, which are then one product: nobody may write
        into rows between. `rows`: of the products that will come, at most.
        """
        self._originals: list[tuple[Tensor, ...]] = []  # alive, so that no other takes their identity
        self._copies: dict[int, _Copy] = {}
        for some in weights:
            size = sum(weight.numel() * weight.element_size() for weight in some)
            plain = all(type(one) in (Tensor, nn.Parameter) and one.is_contiguous() for one in some) and _suits(*some)
            known = any(id(one) in self._copies for one in some) or len({id(one) for one in some}) < len(some)
            if not plain or size > most_bytes or known or not torch.backends.mkldnn.is_available():
                continue
            most_bytes -= size
            self._originals.append(some)
            weight = some[0].detach() if len(some) == 1 else torch.cat([one.detach() for one in some])
            turned = rows == 1
            read = weight.t().contiguous() if turned else torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
            ends = list(accumulate(len(one) for one in some))
            spans = {id(one): (end - len(one), end) for one, end in zip(some, ends, strict=True)}
            self._copies |= dict.fromkeys(spans, _Copy(read, spans))

    @contextmanager
    def used(self) -> Iterator[None]:
        token = _PACKED.set(self._copies)
        try:
            yield
        finally:
            _PACKED.reset(token)
            for copy in self._copies.values():
                copy.rows = copy.product = None


def packed(*weights: Tensor) -> _Copy | None:
    """Their copy, within `PackedWeights.used` and where nothing is to be differentiated. Several: neighbours in one."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    copies = _PACKED.get()
    found = copies.get(id(weights[0])) if copies else None
    if found is None:
        return None
    return found if all(id(one) in found.ends for one in weights[1:]) else None


def few_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., D], weight [N, D] -> x weight^T + bias [..., N], the faster way."""
    copied = packed(weight)
    if copied is not None and x.dtype == torch.float32 and x.numel() > 0:
        return copied.part(x, (weight,), bias)
    small = x.numel() <= MOST_ROWS * weight.shape[1] and weight.numel() < MOST_ELEMENTS
    if small or not _ours(x, weight) or not torch.backends.mkldnn.is_available():
        return nn.functional.linear(x, weight, bias)
    return _onednn(x, weight, bias)


def few_product_onto(base: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """base [M, N] + `few_product` of x [M, D], in one call where there is a copy."""
    copied = packed(weight)
    if copied is not None and len(copied.ends) == 1 and x.dtype == base.dtype == torch.float32:
        if copied.read.is_mkldnn:
            out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, base, copied.read, bias, "add")
            return out
        if bias is None and not _in_bags(x, copied.read):
            return torch.addmm(base, x, copied.read)
    return base + few_product(x, weight, bias)


def joined_product(x: Tensor, *weights: Tensor) -> Tensor | None:
    """x [..., D], several [N, D] -> their products beside each other [..., M N]; None where there is no copy of all.

    A part of a larger product, perhaps: whole rows don't lie next to each other then.
    """
    copied = packed(*weights)
    if copied is None or x.dtype != torch.float32 or x.numel() == 0:
        return None
    return copied.part(x, weights)


def _from_copy(x: Tensor, copied: Tensor, bias: Tensor | None) -> Tensor:
    if copied.is_mkldnn:
        return _onednn(x, copied, bias)
    if x.dim() != 2:
        out = _from_copy(x.reshape(-1, x.shape[-1]), copied, bias)
        return out.view(*x.shape[:-1], out.shape[-1])
    if _in_bags(x, copied):
        inputs = len(copied)
        starts = torch.arange(0, inputs, -(-inputs // BAGS))
        bags = torch.embedding_bag(copied, torch.arange(inputs), starts, False, 0, False, x.view(-1), False)[0]
        return bags.sum(0, keepdim=True) if bias is None else bags.sum(0, keepdim=True).add_(bias)
    return torch.mm(x, copied) if bias is None else torch.addmm(bias, x, copied)


def _in_bags(x: Tensor, turned: Tensor) -> bool:
    """Whether the product of x [M, D] with a turned copy is a sum of bags."""
    return x.shape[0] == 1 and turned.numel() >= BAGGED_ELEMENTS


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])


@cache
def reads_matrices_faster() -> bool:
    """Whether this is a processor on which MKL reads a matrix faster in a product with a matrix than with a vector."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()[:4096]
    except OSError:  # not Linux
        return False
