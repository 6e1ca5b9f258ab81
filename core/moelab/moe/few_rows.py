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
from typing import Any

import numpy as np
import numpy.typing as npt
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

    bank: ExpertBank
    gate_up: Tensor  # [E D, M F], a copy: a row for each input of each expert
    down: Tensor  # [E F, D], the bank's own
    inputs: npt.NDArray[np.int32]  # [E, D], the rows of gate_up that are an expert's
    neurons: npt.NDArray[np.int32]  # [E, F], those of down
    most: int  # assignments, up to which bags of rows are the quicker way
    together: int  # assignments, from which those of an expert are computed one after the other
    biased: bool

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
        rows = np.arange(experts * max(size, each), dtype=np.int32)
        inputs, neurons = (rows[: experts * one].reshape(experts, one) for one in (size, each))
        rows_each = max(BAGGED, min(BAGGED_SMALL, BAGGED_NUMBERS // (width * size)))
        return cls(
            bank, copied.view(-1, width), bank.down.detach().view(-1, size), inputs, neurons,
            most=min(rows_each * experts, MOST_NUMBERS // max(width, size)),
            together=experts // TOGETHER + 1,
            biased=bank.gate_up_bias is not None or bank.down_bias is not None,
        )  # fmt: skip

    @classmethod
    def of_all(cls, banks: Iterable[ExpertBank]) -> dict[int, ExpertTables]:
        """As `reading` wants them: by the identity of each bank's gate_up."""
        return {id(made.bank.gate_up): made for bank in banks if (made := cls.of(bank)) is not None}

    def serve(self, x: Tensor, routing: Routing) -> bool:
        """Whether they are the quicker way of computing this, where nothing is to be differentiated."""
        return x.dtype == torch.float32 and not routing.weights_on_input and 0 < routing.expert.shape[0] <= self.most

    def served(self, x: Tensor, routing: Routing) -> Tensor:
        """x [T, D] -> [T, D]."""
        together = routing.top_k is not None and routing.expert.shape[0] >= self.together
        y = (_by_expert if together else _by_token)(x, routing, self)
        return add_down_bias(y, routing, self.bank) if self.biased else y


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
    if found is None or torch.is_grad_enabled() or compute_dtype(x) != torch.float32:
        return None
    return found if found.serve(x.float(), routing) else None


def few_rows(x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
    """What a backend computes: x [T, D] -> [T, D] in x's dtype. No gradient."""
    tables = _tables(x, routing, bank)
    if tables is not None:
        return tables.served(x.float(), routing).to(x.dtype)
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
    y = _finished(hidden, routing, down.view(experts * width, size), row)
    return add_down_bias(y, routing, bank).to(x.dtype)


def _by_token(rows: Tensor, routing: Routing, tables: ExpertTables) -> Tensor:
    """rows [T, D] -> [T, D], two bags of rows for each assignment."""
    expert, given = routing.expert.numpy(), rows.index_select(0, routing.token)  # [N, D]
    hidden = _hidden(given, expert, tables)
    return _finished(hidden, routing, tables.down, _taken(tables.neurons, expert))


def _by_expert(rows: Tensor, routing: Routing, tables: ExpertTables) -> Tensor:
    """The same, those of an expert one after the other, so that its weights are still in the processor's cache."""
    assert routing.top_k is not None
    chosen = routing.expert.numpy()
    order = chosen.argsort(kind="stable")
    expert, back = chosen[order], np.empty_like(order)
    back[order] = np.arange(len(order))
    hidden = _hidden(_taken(rows.detach().numpy(), order // routing.top_k), expert, tables)
    each = bags(_taken(tables.neurons, expert), hidden, tables.down, len(order))  # [N, D]
    return bags(torch.from_numpy(back), routing.weight.to(each.dtype), each, rows.shape[0])


def _hidden(given: Tensor, expert: npt.NDArray[np.int64], tables: ExpertTables) -> Tensor:
    """given [N, D] of rows that go to expert [N] -> their neurons [N, F]."""
    pre = bags(_taken(tables.inputs, expert), given, tables.gate_up, len(expert))  # [N, M F]
    if tables.biased:
        pre = add_up_bias(pre, torch.from_numpy(expert), tables.bank)
    return tables.bank.activate(pre)


def _taken(table: npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> Tensor:
    """table [R, W], rows [N] -> [N, W]. By numpy: for so few numbers its calls take a third of the time of torch's."""
    return torch.from_numpy(table.take(rows, 0))


def _finished(hidden: Tensor, routing: Routing, table: Tensor, row: Tensor) -> Tensor:
    """hidden [N, F], in the routing's order -> [T, D]: each token's sum over its experts' neurons, weighted.

    row [N, F]: where in table [E F, D] they are. The weight of an assignment is on its neurons, not on their sum: the
    same number but for rounding.
    """
    weighted = hidden * routing.weight.to(hidden.dtype).unsqueeze(-1)
    if routing.top_k is not None:
        return bags(row, weighted, table, routing.num_tokens)
    each = bags(row, weighted, table, hidden.shape[0])  # [N, D]
    return each.new_zeros(routing.num_tokens, each.shape[1]).index_add_(0, routing.token, each)


def bags(row: Tensor, weights: Tensor, table: Tensor, count: int) -> Tensor:
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
