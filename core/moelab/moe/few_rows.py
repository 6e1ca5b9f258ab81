"""The experts for a few tokens without gradients, as in generation: weights are read once, where they lie.

On a CPU a token costs what its experts' weights take to read. What training needs around the products (rows laid out
and padded, autograd's nodes) costs as much again, so none of it is here. Quickest is a bag of rows (embedding_bag): a
token's sum over the neurons of its experts, each times its activation, is one, since the down matrix holds a row for
each neuron; so is gate_up, where a copy of it holds a row for each input (`ExpertTables`).
T tokens, N assignments, E experts, F expert width, M F rows of gate_up, D hidden size. benchmarks/generation.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moelab.moe.dispatch import count_ids
from moelab.moe.experts import ExpertBank, add_down_bias, add_up_bias, compute_dtype
from moelab.moe.routing import Routing

MOST = 512  # assignments, where there are no tables
BAGGED = 8  # rows of an expert on average; beyond, products read its matrices less often ...
BAGGED_SMALL = 64  # ... and of small experts, whose gate_up times the rows has BAGGED_NUMBERS at most
BAGGED_NUMBERS = 1 << 23
MOST_NUMBERS = 1 << 23  # read and written around the products of one call; each has an index beside it
STRIP = 32  # neurons turned at once
TOGETHER = 2  # assignments times this, from more than experts: those of an expert one after the other
GROUPED = 4  # assignments times this, from as many as experts: one call for all experts is quicker than one for each


@dataclass(frozen=True)
class ExpertTables:
    """A bank as bags of rows read it, for many calls of `few_rows`. What it copies are the weights as they were."""

    original: Tensor  # the bank's gate_up, by whose identity the tables are found
    gate_up: Tensor  # [E D, M F], a copy: a row for each input of each expert
    down: Tensor  # [E F, D], the bank's own
    inputs: Tensor  # [E, D] int32, the rows of gate_up that are an expert's
    neurons: Tensor  # [E, F] int32, those of down
    most: int  # assignments, up to which bags of rows are the quicker way

    @classmethod
    def of(cls, bank: ExpertBank) -> ExpertTables | None:
        """None where they are of no use: not fp32, not on a CPU."""
        if bank.gate_up.dtype != torch.float32 or bank.gate_up.device.type != "cpu":
            return None
        (experts, width, size), each = bank.gate_up.shape, bank.down.shape[1]
        copied = bank.gate_up.new_empty(experts, size, width)
        # In strips: 0.4 to 0.8 of the time that one expert after the other takes, and 0.2 to 0.8 of that of all at
        # once (128 x 256 to 2816 x 2048).
        for source, target in zip(bank.gate_up.detach().split(STRIP, 1), copied.split(STRIP, 2), strict=True):
            target.copy_(source.transpose(1, 2))
        rows = torch.arange(experts * max(size, each), dtype=torch.int32)
        inputs, neurons = (rows[: experts * one].view(experts, one) for one in (size, each))
        rows_each = max(BAGGED, min(BAGGED_SMALL, BAGGED_NUMBERS // (width * size)))
        most = min(rows_each * experts, MOST_NUMBERS // max(width, size))
        return cls(bank.gate_up, copied.view(-1, width), bank.down.detach().view(-1, size), inputs, neurons, most)

    @classmethod
    def of_all(cls, banks: Iterable[ExpertBank]) -> dict[int, ExpertTables]:
        """As `reading` wants them: by the identity of each bank's gate_up."""
        return {id(made.original): made for bank in banks if (made := cls.of(bank)) is not None}


_TABLES: ContextVar[Mapping[int, ExpertTables]] = ContextVar("tables", default={})  # noqa: B039 - never written to


@contextmanager
def reading(tables: Mapping[int, ExpertTables]) -> Iterator[None]:
    """Within, `few_rows` reads the banks of these tables (`ExpertTables.of_all`) by them."""
    token = _TABLES.set(tables)
    try:
        yield
    finally:
        _TABLES.reset(token)


def pays(x: Tensor, routing: Routing, bank: ExpertBank) -> bool:
    """Whether `few_rows` is the way: on a CPU, where nothing is to be differentiated, of few assignments."""
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and (assignments := routing.expert.numel()) > 0
        and (assignments <= MOST or _tables(x, routing, bank) is not None)
        and not isinstance(x, FakeTensor)
        and not torch.compiler.is_compiling()
    )


def _tables(x: Tensor, routing: Routing, bank: ExpertBank) -> ExpertTables | None:
    known = _TABLES.get()
    found = known.get(id(bank.gate_up)) if known else None
    if found is None or not 0 < routing.expert.numel() <= found.most or torch.is_grad_enabled():
        return None
    return found if compute_dtype(x) == torch.float32 else None


def by_tables(x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor | None:
    """`few_rows` where there are tables of the bank, and they pay; None elsewhere."""
    tables = _tables(x, routing, bank)
    if tables is None:
        return None
    together = routing.top_k and TOGETHER * routing.expert.numel() > bank.num_experts
    return (_by_expert if together else _by_token)(x.float(), routing, bank, tables).to(x.dtype)


def few_rows(x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
    """What a backend computes: x [T, D] -> [T, D] in x's dtype. No gradient."""
    found = by_tables(x, routing, bank)
    if found is not None:
        return found
    dtype = compute_dtype(x)
    assignments, experts = routing.expert.numel(), bank.num_experts
    bagged = assignments <= BAGGED * experts
    rows, down = x.to(dtype), bank.down.to(dtype)
    gate_up = bank.gate_up.to(dtype)
    order = routing.expert.argsort(stable=True)
    expert = routing.expert.index_select(0, order)
    given = rows.index_select(0, routing.token.index_select(0, order))
    if GROUPED * assignments < experts or not _grouped(gate_up, down):
        pre = _one_by_one(given, expert, gate_up)
    else:
        ends = count_ids(expert, experts).cumsum(0, dtype=torch.int32)
        pre = torch.nn.functional.grouped_mm(given, gate_up.transpose(1, 2), offs=ends)
        if not bagged:
            hidden = bank.activate(add_up_bias(pre, expert, bank))
            out = torch.nn.functional.grouped_mm(hidden, down, offs=ends)
            weight = routing.weight.index_select(0, order).to(dtype).unsqueeze(-1)
            y = rows.new_zeros(x.shape[0], out.shape[1])
            y.index_add_(0, routing.token.index_select(0, order), out.mul_(weight))
            return add_down_bias(y, routing, bank).to(x.dtype)
    hidden = bank.activate(add_up_bias(pre, expert, bank))  # [N, F], in expert order
    hidden = torch.empty_like(hidden).index_copy_(0, order, hidden)
    experts, width, size = down.shape
    row = routing.expert.unsqueeze(-1) * width + torch.arange(width)
    return _finished(hidden, routing, bank, down.view(experts * width, size), row).to(x.dtype)


def _by_token(rows: Tensor, routing: Routing, bank: ExpertBank, tables: ExpertTables) -> Tensor:
    """rows [T, D] -> [T, D], two bags of rows for each assignment."""
    expert, given = routing.expert, rows.index_select(0, routing.token)  # [N, D]
    pre = _bags(tables.inputs.index_select(0, expert), given, tables.gate_up, given.shape[0])  # [N, M F]
    hidden = bank.activate(add_up_bias(pre, expert, bank))
    return _finished(hidden, routing, bank, tables.down, tables.neurons.index_select(0, expert))


def _by_expert(rows: Tensor, routing: Routing, bank: ExpertBank, tables: ExpertTables) -> Tensor:
    """The same, those of an expert one after the other, so that its weights are still in the processor's cache."""
    assert routing.top_k is not None
    expert, order = routing.expert.sort()
    given = rows.index_select(0, order // routing.top_k)
    pre = _bags(tables.inputs.index_select(0, expert), given, tables.gate_up, given.shape[0])
    hidden = bank.activate(add_up_bias(pre, expert, bank))
    each = _bags(tables.neurons.index_select(0, expert), hidden, tables.down, given.shape[0])  # [N, D]
    back = torch.empty_like(order).scatter_(0, order, _starts(order.shape[0], 1, order.dtype))
    return add_down_bias(_bags(back, routing.weight.to(each.dtype), each, rows.shape[0]), routing, bank)


def _finished(hidden: Tensor, routing: Routing, bank: ExpertBank, table: Tensor, row: Tensor) -> Tensor:
    """hidden [N, F], in the routing's order -> [T, D]: each token's sum over its experts' neurons, weighted.

    row [N, F]: where in table [E F, D] they are. The weight of an assignment is on its neurons, not on their sum: the
    same number but for rounding.
    """
    weighted = hidden * routing.weight.to(hidden.dtype).unsqueeze(-1)
    if routing.top_k is not None:
        y = _bags(row, weighted, table, routing.num_tokens)
    else:
        each = _bags(row, weighted, table, hidden.shape[0])  # [N, D]
        y = each.new_zeros(routing.num_tokens, each.shape[1]).index_add_(0, routing.token, each)
    return add_down_bias(y, routing, bank)


def _bags(row: Tensor, weights: Tensor, table: Tensor, count: int) -> Tensor:
    """row [...] of table [R, W] and the weight of each, of the same number -> [count, W], sums of equally many."""
    starts = _starts(count, row.numel() // count, row.dtype)
    found: Tensor = torch.embedding_bag(table, row.view(-1), starts, False, 0, False, weights.reshape(-1), False)[0]
    return found


@lru_cache(maxsize=64)
def _starts(count: int, each: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(0, count * each, each, dtype=dtype)


def _one_by_one(given: Tensor, expert: Tensor, gate_up: Tensor) -> Tensor:
    """given [N, D] in the order of expert [N] -> [N, M F], a product for each expert that was chosen."""
    counts = [(index, len(list(run))) for index, run in groupby(expert.tolist())]
    pre = given.new_empty(len(given), gate_up.shape[1])
    sizes = [size for _, size in counts]
    for (index, _), rows, out in zip(counts, given.split(sizes), pre.split(sizes), strict=True):
        torch.mm(rows, gate_up[index].t(), out=out)
    return pre


def _grouped(gate_up: Tensor, down: Tensor) -> bool:
    """Whether torch's grouped product takes them: dtypes, and strides of a multiple of 16 bytes."""
    if gate_up.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    unit = 16 // gate_up.element_size()
    return gate_up.shape[1] % unit == 0 and down.shape[1] % unit == 0 and down.shape[2] % unit == 0
