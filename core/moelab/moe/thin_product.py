"""Products of a few rows with a matrix, without gradients: what a token of generation mostly consists of.

They cost what the matrix takes to read, where a kernel reads it as fast as memory gives it; small ones, the call.
Measured on AMD's processors (Zen 5, one core, other weights read in between):

- MKL is quickest for up to 8 rows and 2^20 elements; else oneDNN takes 0.5 to 1.0 of its time.
- Where many products come, a copy pays (`PackedWeights`). Of one row: the matrix turned, in 0.75 to 0.85 of that; from
  2^21 elements on as four bags of its rows (embedding_bag), which read 4864 x 896 at 73 GB/s where MKL and oneDNN read
  17 to 23. Of more rows: oneDNN's own order, 0.7 to 1.0 of the best of the others, from 3 rows on.

On others' processors there are no such constants: `nn.functional.linear` is used, but where generation has measured
which way is quickest (thin_ways.py). Decided by the processor's maker and by sizes, or by what is kept of the machine,
so that a machine always rounds alike.
M rows, D columns, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moelab.kernels.onednn import dense_bias, is_dense, is_plain, may_use_onednn, pointwise
from moelab.processor import cpu_lines

MOST_ROWS = 8  # that MKL is quicker for ...
MOST_ELEMENTS = 1 << 20  # ... of a matrix smaller than that
LEAST_ELEMENTS = 1 << 15  # of the matrix; below, it is the call that takes time
BAGGED_ELEMENTS = 1 << 21  # of a turned copy: from here as so many bags
BAGS = 4
PACKED_ROWS = 16  # that the order of a copy is chosen for; others' differ by less than a measurement does
LEAST_PACKED = 3  # rows from which packing pays by the constants ...
PACKED_ALONE = 1 << 20  # ... of matrices of fewer elements than this

# Ways of a product of few rows: of the original, as `few_product` chooses without a copy, or by oneDNN; of a turned
# copy, whole, or where there is one row as a sum of bags; of a copy in oneDNN's own order.
ORIGINAL, ONEDNN, TURNED, BAGGED, PACKED = "original", "onednn", "turned", "bags", "packed"
WayOf = Callable[[tuple[Tensor, ...]], str]  # of matrices that read the same rows


def _ours(x: Tensor, weight: Tensor) -> bool:
    """Whether the constants have something to choose."""
    return (
        not torch.is_grad_enabled()
        and x.numel() > 0
        and x.dtype == torch.float32
        and is_plain(x)
        and reads_matrices_faster()
        and _suits(weight)
    )


def usual_way(weights: tuple[Tensor, ...], rows: int) -> str:
    """The constants' way for products of `rows` rows, where many are to come."""
    elements = sum(weight.numel() for weight in weights)
    if not reads_matrices_faster() or (1 < rows < LEAST_PACKED and elements < PACKED_ALONE):
        return ORIGINAL
    if rows > 1:
        return PACKED
    return BAGGED if elements >= BAGGED_ELEMENTS else TURNED


def readable(weights: tuple[Tensor, ...]) -> bool:
    """Whether products with these, as one, may go another way than `nn.functional.linear`'s."""
    return _suits(*weights) and all(one.is_contiguous() for one in weights) and may_use_onednn()


def _suits(*weights: Tensor) -> bool:
    """Whether products with them, read as one, are of a kind that was measured."""
    return (
        sum(weight.numel() for weight in weights) >= LEAST_ELEMENTS
        and all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in weights)
        and not torch.is_autocast_enabled("cpu")
        and is_plain(*weights)
    )


class Copy:
    """Of matrices that read the same rows, with their product with the rows that came last."""

    def __init__(self, way: str, read: Tensor) -> None:
        self.way = way
        self.read = read
        self.rows: Tensor | None = None
        self.kept: Tensor | None = None

    @classmethod
    def of(cls, weights: tuple[Tensor, ...], way: str) -> Copy:
        """As `way` reads them: one matrix itself by ONEDNN."""
        weight = weights[0].detach() if len(weights) == 1 else torch.cat([one.detach() for one in weights])
        if way == PACKED:
            return cls(way, torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS))
        return cls(way, weight if way == ONEDNN else weight.t().contiguous())

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., D] -> [..., N]."""
        if self.way in (PACKED, ONEDNN):
            return _onednn(x, self.read, bias)
        if x.dim() != 2:
            out = self.product(x.reshape(-1, x.shape[-1]), bias)
            return out.view(*x.shape[:-1], out.shape[-1])
        if self.way == BAGGED and x.shape[0] == 1:
            return _sum_of_bags(x, self.read, bias)
        return torch.mm(x, self.read) if bias is None else torch.addmm(bias, x, self.read)


class _Part(NamedTuple):
    """A matrix in a copy: its columns of the product."""

    copy: Copy
    begin: int
    end: int
    alone: bool  # no other matrix is in it

    def of(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., n]."""
        return self.copy.product(x) if self.alone else self.up_to(self, x)

    def up_to(self, last: _Part, x: Tensor) -> Tensor:
        """The product with this matrix and those behind it in the copy up to `last`; computed once for the same x."""
        copy = self.copy
        if copy.rows is not x or copy.kept is None:
            copy.rows, copy.kept = x, copy.product(x)
        return copy.kept.narrow(-1, self.begin, last.end - self.begin)


_PACKED: ContextVar[Mapping[int, _Part]] = ContextVar("packed", default={})  # noqa: B039 - never written to


class PackedWeights:
    """Copies of matrices as products of few rows read them best, as they are now: made in the time of 4 to 40 products.

    Within `used`, `few_product` and `joined_product` read these in place of their originals, known by identity.
    """

    def __init__(
        self, weights: Iterable[tuple[Tensor, ...]], most_bytes: int, rows: int = PACKED_ROWS, way: WayOf | None = None
    ) -> None:
        """Of the first that fit in `most_bytes`; of none where a copy is of no use (see `readable`).

        weights: each alone, or those that read the same rows together, which are then one product: nobody may write
        into rows between. `rows`: of the products that will come, at most. `way`: of each; None: `usual_way`.
        """
        self._originals: list[tuple[Tensor, ...]] = []  # alive, so that no other takes their identity
        self._parts: dict[int, _Part] = {}
        for some in weights:
            known = any(id(one) in self._parts for one in some) or len({id(one) for one in some}) < len(some)
            if known or not readable(some):
                continue
            chosen = usual_way(some, rows) if way is None else way(some)
            size = 0 if chosen == ONEDNN else sum(weight.numel() * weight.element_size() for weight in some)
            if chosen == ORIGINAL or size > most_bytes:
                continue
            most_bytes -= size
            self._originals.append(some)
            for together in ((one,) for one in some) if chosen == ONEDNN else (some,):
                copy, ends = Copy.of(together, chosen), list(accumulate(len(one) for one in together))
                for one, end in zip(together, ends, strict=True):
                    self._parts[id(one)] = _Part(copy, end - len(one), end, len(together) == 1)

    @contextmanager
    def used(self) -> Iterator[None]:
        token = _PACKED.set(self._parts)
        try:
            yield
        finally:
            _PACKED.reset(token)
            for part in self._parts.values():
                part.copy.rows = part.copy.kept = None


def is_packed(weight: Tensor) -> bool:
    """Whether a copy is read in its place: within `PackedWeights.used`, where nothing is to be differentiated."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and id(weight) in _PACKED.get()


def _packed(x: Tensor, weight: Tensor) -> _Part | None:
    """The copy of weight, where it serves x."""
    if not is_packed(weight) or x.dtype != torch.float32 or x.numel() == 0:
        return None
    return _PACKED.get()[id(weight)]


def few_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., D], weight [N, D] -> x weight^T + bias [..., N], the faster way."""
    found = _packed(x, weight)
    if found is not None:
        if found.alone:
            return found.copy.product(x, bias)
        return found.of(x) if bias is None else found.of(x) + bias
    small = x.numel() <= MOST_ROWS * weight.shape[1] and weight.numel() < MOST_ELEMENTS
    if small or not _ours(x, weight) or not is_dense(weight) or not may_use_onednn():
        return nn.functional.linear(x, weight, bias)
    return _onednn(x, weight, bias)


def few_product_onto(base: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """base [M, N] + `few_product` of x [M, D], in one call where there is a copy."""
    found = _packed(x, weight)
    if found is not None and found.alone and base.dtype == torch.float32:
        way, read = found.copy.way, found.copy.read
        if way == PACKED:
            out: Tensor = pointwise().binary(x, base, read, dense_bias(bias), "add")
            return out
        if bias is None and (way == TURNED or (way == BAGGED and x.shape[0] > 1)):
            return torch.addmm(base, x, read)
    return base + few_product(x, weight, bias)


def joined_product(x: Tensor, *weights: Tensor) -> Tensor | None:
    """x [..., D], several [N, D] -> their products beside each other [..., M N]; None where there is no copy of all.

    Several: neighbours in the copy, in its order. A part of a larger product, perhaps: whole rows don't lie next to
    each other then.
    """
    first = _packed(x, weights[0])
    if first is None:
        return None
    if len(weights) == 1:
        return first.of(x)
    copies = _PACKED.get()
    parts = [copies.get(id(weight)) for weight in weights]
    if any(part is None or part.copy is not first.copy for part in parts):
        return None
    last = parts[-1]
    assert last is not None
    return first.up_to(last, x)


def reader(*weights: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor] | None:
    """`joined_product` of rows that are yet to come, x [M, D] fp32, with everything looked up now.

    `bias`: of a matrix whose copy is its own.
    """
    copies = _PACKED.get()
    parts = [found for weight in weights if (found := copies.get(id(weight))) is not None]
    if len(parts) < len(weights) or any(part.copy is not parts[0].copy for part in parts):
        return None
    if not parts[0].alone:
        return parts[0].of if len(parts) == 1 else partial(parts[0].up_to, parts[-1])
    copy, read = parts[0].copy, parts[0].copy.read
    if copy.way != PACKED:
        return lambda x: copy.product(x, bias)
    product, bias = pointwise().default, dense_bias(bias)

    def product_of(x: Tensor) -> Tensor:
        out: Tensor = product(x, read, bias, "none", [], "")
        return out

    return product_of


def adder(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """`few_product_onto` of what is yet to come: (base [M, N], x [M, D]) -> base + x weight^T + bias."""
    found = _PACKED.get().get(id(weight))
    if found is None or not found.alone or found.copy.way != PACKED:
        return lambda base, x: few_product_onto(base, x, weight, bias)
    product, read, bias = pointwise().binary, found.copy.read, dense_bias(bias)

    def added(base: Tensor, x: Tensor) -> Tensor:
        out: Tensor = product(x, base, read, bias, "add")
        return out

    return added


def _sum_of_bags(x: Tensor, turned: Tensor, bias: Tensor | None) -> Tensor:
    """x [1, D], turned [D, N] -> [1, N]."""
    inputs = len(turned)
    starts = torch.arange(0, inputs, -(-inputs // BAGS))
    bags = torch.embedding_bag(turned, torch.arange(inputs), starts, False, 0, False, x.view(-1), False)[0]
    return bags.sum(0, keepdim=True) if bias is None else bags.sum(0, keepdim=True).add_(bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out: Tensor = pointwise().default(rows, weight, dense_bias(bias), "none", [], "")
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])


@cache
def reads_matrices_faster() -> bool:
    """Whether this is a processor on which MKL reads a matrix faster in a product with a matrix than with a vector."""
    if not torch.backends.mkl.is_available():
        return False
    return cpu_lines().get("vendor_id") == "AuthenticAMD"
