"""The experts for a few tokens without gradients, as in generation: weights are read once, where they lie.

On a CPU a token costs what its experts' weights take to read. What training needs around the products (rows laid out
and padded, autograd's nodes) costs as much again, so none of it is here. Quickest is a bag of rows (embedding_bag): a
token's sum over the neurons of its experts, each times its activation, is one, since the down matrix holds a row for
each neuron; so is gate_up, where a copy of it holds a row for each input (`input_first`).
T tokens, N assignments, E experts, F expert width, M F rows of gate_up, D hidden size. benchmarks/generation.py.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moelab.moe.dispatch import count_ids
from moelab.moe.experts import ExpertBank, add_down_bias, add_up_bias, compute_dtype
from moelab.moe.routing import Routing
from moelab.moe.thin_product import MOST_ROWS, left_product, thin_pays

MOST = 512  # assignments
BAGGED = 8  # rows of an expert on average; beyond, products read its matrices less often
GROUPED = 4  # assignments times this, from as many as experts: one call for all experts is quicker than one for each


def pays(x: Tensor, routing: Routing) -> bool:
    """Whether `few_rows` is the way: on a CPU, where nothing is to be differentiated, of few assignments."""
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and 0 < routing.expert.numel() <= MOST
        and not isinstance(x, FakeTensor)
        and not torch.compiler.is_compiling()
    )


def input_first(bank: ExpertBank) -> Tensor | None:
    """A copy of gate_up as [E, D, M F], for many calls of `few_rows`; None where it is of no use (not fp32, no CPU)."""
    usable = bank.gate_up.dtype == torch.float32 and bank.gate_up.device.type == "cpu"
    return bank.gate_up.detach().transpose(1, 2).contiguous() if usable else None


def few_rows(x: Tensor, routing: Routing, bank: ExpertBank, copied: Tensor | None = None) -> Tensor:
    """What a backend computes: x [T, D] -> [T, D] in x's dtype. No gradient. `copied`: `input_first(bank)`."""
    dtype = compute_dtype(x)
    rows, down = x.to(dtype), bank.down.to(dtype)
    bagged = routing.expert.numel() <= BAGGED * bank.num_experts
    if copied is not None and copied.dtype == dtype and bagged:
        experts, size, width = copied.shape
        table = copied.view(experts * size, width)
        if routing.expert.numel() > bank.num_experts:
            return _by_expert(rows, routing, bank, table, down).to(x.dtype)
        given = rows.index_select(0, routing.token)  # [N, D]
        pre = _bags(routing.expert, given, table, len(given))
        return _finished(bank.activate(add_up_bias(pre, routing.expert, bank)), routing, bank, down).to(x.dtype)
    gate_up = bank.gate_up.to(dtype)
    order = routing.expert.argsort(stable=True)
    expert = routing.expert.index_select(0, order)
    given = rows.index_select(0, routing.token.index_select(0, order))
    if GROUPED * len(order) < bank.num_experts or not _grouped(gate_up, down):
        pre = _one_by_one(given, expert, gate_up)
    else:
        ends = count_ids(expert, bank.num_experts).cumsum(0, dtype=torch.int32)
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
    return _finished(hidden, routing, bank, down).to(x.dtype)


def _by_expert(rows: Tensor, routing: Routing, bank: ExpertBank, table: Tensor, down: Tensor) -> Tensor:
    """The rows of an expert one after the other, so that its weights are still in the processor's cache: -> [T, D]."""
    order = routing.expert.argsort()
    expert, token = routing.expert.index_select(0, order), routing.token.index_select(0, order)
    pre = _bags(expert, rows.index_select(0, token), table, len(order))  # [N, M F]
    weight = routing.weight.index_select(0, order).to(rows.dtype).unsqueeze(-1)
    hidden = bank.activate(add_up_bias(pre, expert, bank)) * weight
    each = _bags(expert, hidden, down.view(-1, down.shape[-1]), len(order))
    y = each.new_zeros(routing.num_tokens, each.shape[1]).index_add_(0, token, each)
    return add_down_bias(y, routing, bank)


def _finished(hidden: Tensor, routing: Routing, bank: ExpertBank, down: Tensor) -> Tensor:
    """hidden [N, F], in the routing's order -> [T, D]: each token's sum over its experts' neurons, weighted.

    The weight of an assignment is on its neurons, not on their sum: the same number but for rounding.
    """
    experts, width, size = down.shape
    table = down.view(experts * width, size)
    weighted = hidden * routing.weight.to(hidden.dtype).unsqueeze(-1)
    if routing.top_k is not None:
        y = _bags(routing.expert, weighted, table, routing.num_tokens)
    else:
        each = _bags(routing.expert, weighted, table, len(hidden))  # [N, D]
        y = each.new_zeros(routing.num_tokens, size).index_add_(0, routing.token, each)
    return add_down_bias(y, routing, bank)


def _bags(expert: Tensor, weights: Tensor, table: Tensor, count: int) -> Tensor:
    """weights [N, n], of the n rows of table [E n, W] that belong to each assignment's expert [N] -> [count, W].

    A bag is the rows of N / count assignments, in order.
    """
    each = weights.shape[1]
    row = expert.unsqueeze(-1) * each + torch.arange(each, device=expert.device)  # [N, n]
    starts = torch.arange(0, row.numel(), row.numel() // count, device=expert.device)
    found: Tensor = torch.embedding_bag(table, row.view(-1), starts, False, 0, False, weights.reshape(-1), False)[0]
    return found


def _one_by_one(given: Tensor, expert: Tensor, gate_up: Tensor) -> Tensor:
    """given [N, D] in the order of expert [N] -> [N, M F], a product for each expert that was chosen."""
    counts = [(index, len(list(run))) for index, run in groupby(expert.tolist())]
    pre = given.new_empty(len(given), gate_up.shape[1])
    sizes = [size for _, size in counts]
    thin = thin_pays(given[:1], gate_up[0])
    for (index, size), rows, out in zip(counts, given.split(sizes), pre.split(sizes), strict=True):
        if thin and size <= MOST_ROWS:
            out.copy_(left_product(rows, gate_up[index])[:, :size].t())
        else:
            torch.mm(rows, gate_up[index].t(), out=out)
    return pre


def _grouped(gate_up: Tensor, down: Tensor) -> bool:
    """Whether torch's grouped product takes them: dtypes, and strides of a multiple of 16 bytes."""
    if gate_up.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    unit = 16 // gate_up.element_size()
    return gate_up.shape[1] % unit == 0 and down.shape[1] % unit == 0 and down.shape[2] % unit == 0
