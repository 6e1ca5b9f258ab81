"""MegaBlocks' block-sparse kernels (Gale et al. 2022, 2211.15841): all experts in one product, none dropped.

rows = padded_gather(x); hidden = sdd(rows, gate_up^T), gate and up at once; y = padded_scatter(dsd(act, down)).
No MegaBlocks layer, `Arguments` or global state: only its kernels, on this model's own parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import BackendContext, Component, ExpertBackend, Routing, component, hookimpl
from moelab.moe.activation import activate, num_inputs
from moelab.moe.contracts import ExpertProblem
from moelab.moe.dispatch import combine_rows, dispatch_plan, gather_rows
from moelab.moe.experts import ExpertBank, add_down_bias, compute_dtype
from moelab_plugins.expert_backends._megablocks_install import Kernels, interpreted, load, missing
from moelab_plugins.expert_backends._megablocks_topology import BLOCK, Bins, Topology, bins, topology

INT32 = 2**31 - 1  # stk and MegaBlocks compute addresses in elements, in int32


@dataclass
class MegaBlocksOptions:
    pass


class MegaBlocksBackend:
    """Block-sparse products over rows padded to blocks of 128. CUDA, or the CPU under triton's interpreter."""

    name = "megablocks"

    def __init__(self, options: MegaBlocksOptions, context: BackendContext) -> None:
        self._kernels: Kernels | None = None

    def supports(self, problem: ExpertProblem) -> str | None:
        return missing() or _device(problem) or _sizes(problem) or _overflow(problem)

    def __call__(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        """x [T, D] -> [T, D]."""
        if self._kernels is None:
            self._kernels = load()
        kernels = self._kernels
        dtype = compute_dtype(x)
        plan = dispatch_plan(routing)
        if routing.top_k is None or routing.expert.numel() == 0:
            # The kernels know a fixed K only: sort the rows before them, and mix them after.
            rows = gather_rows(x.to(dtype), plan)
            if rows.shape[0]:
                index = torch.arange(rows.shape[0], device=x.device, dtype=torch.int32)
                expert = routing.expert.index_select(0, plan.order).int()
                rows = _experts(kernels, rows, bank, _Order(index, expert, bins(plan.counts), 1), None)
            return add_down_bias(combine_rows(rows, routing.weight, plan), routing, bank).to(x.dtype)
        expert = routing.expert.index_select(0, plan.order).int()
        order = _Order(plan.order.int(), expert, bins(plan.counts), routing.top_k)
        y = _experts(kernels, x.to(dtype), bank, order, routing.weight.to(dtype))
        return add_down_bias(y, routing, bank).to(x.dtype)


@dataclass(frozen=True)
class _Order:
    """Assignments sorted by expert, in MegaBlocks' terms."""

    index: Tensor  # [N] int32: which assignment
    expert: Tensor  # [N] int32: whose bin
    bins: Bins
    top_k: int


def _experts(kernels: Kernels, x: Tensor, bank: ExpertBank, order: _Order, weight: Tensor | None) -> Tensor:
    """x [T, D], weight [T * K] or None -> [T, D]."""
    index, expert, bound = order.index, order.expert, order.bins
    # Waits for the device once, inside: the number of padded rows sizes everything that follows.
    rows = kernels.padded_gather(x, index, expert, bound.rows, bound.padded_rows, order.top_k)  # [P, D]
    width = bank.down.shape[1]
    parts = num_inputs(bank.activation)
    hidden_map = topology(bound.padded_rows, rows.shape[0], parts * width)
    act_map = topology(bound.padded_rows, rows.shape[0], width)
    gate_up = bank.gate_up.to(x.dtype).flatten(0, 1)  # [E * M F, D]
    hidden = kernels.sdd(rows, gate_up.t(), block_matrix(kernels, hidden_map, None, x.dtype))
    pre = hidden.data  # [B, 128, 128]
    if bank.gate_up_bias is not None:
        columns = bank.gate_up_bias.to(x.dtype).view(-1, BLOCK)  # of each block column
        pre = pre + columns.index_select(0, hidden_map.column)[:, None, :]
    # A block row holds its expert's gate blocks, if it has some, then its up blocks.
    act = activate(bank.activation, pre.view(-1, parts, width * BLOCK))
    out = kernels.dsd(
        block_matrix(kernels, act_map, act.reshape(-1, BLOCK, BLOCK), x.dtype), bank.down.to(x.dtype).flatten(0, 1)
    )
    y: Tensor = kernels.padded_scatter(out, index, expert, weight, bound.rows, bound.padded_rows, order.top_k)
    return y


def block_matrix(kernels: Kernels, at: Topology, data: Tensor | None, dtype: torch.dtype) -> object:
    """An stk.Matrix; without data, the mere shape of a product."""
    if data is None:
        data = torch.empty(at.column.numel(), BLOCK, BLOCK, dtype=dtype, device="meta")
    return kernels.matrix(
        at.shape, data, at.row, at.column, at.starts, at.row_transposed, at.starts_transposed, at.block_transposed
    )


def _device(problem: ExpertProblem) -> str | None:
    kind = problem.device.type
    if kind == "meta":
        return None
    if interpreted():
        if problem.dtype not in (torch.float32, torch.float16):
            # triton's interpreter multiplies bf16 bit patterns as integers: wrong numbers and no error.
            return f"triton's interpreter (TRITON_INTERPRET=1) is wrong in {problem.dtype}; use float32"
        return None
    if kind != "cuda":
        return f"needs a CUDA device, not {kind} (or TRITON_INTERPRET=1, for tests); use auto"
    if problem.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, not {problem.dtype}; use loop"
    return None


def _sizes(problem: ExpertProblem) -> str | None:
    for key in ("hidden_size", "moe_intermediate_size"):
        size = getattr(problem, key)
        if size % BLOCK:
            return f"{key} must be a multiple of {BLOCK}, not {size}; use auto or grouped_mm"
    return None


def _overflow(problem: ExpertProblem) -> str | None:
    """The largest offset of any kernel must fit int32."""
    hidden, experts = problem.hidden_size, problem.num_experts
    width = num_inputs(problem.activation) * problem.moe_intermediate_size
    if experts * width * hidden > INT32:
        return f"{experts} experts of {width} x {hidden} are more than 2^31 numbers; use grouped_mm"
    room = INT32 // max(hidden, width)  # padded rows
    # Every expert that has rows at all pads less than a block.
    padded = problem.num_assignments + min(experts, problem.num_assignments) * (BLOCK - 1)
    if padded > room:
        least = room - experts * (BLOCK - 1)
        return f"{problem.num_assignments} assignments overflow int32; set model.moe.expert_chunk to at most {least}"
    return None


@hookimpl
def moelab_expert_backends() -> list[Component[BackendContext, ExpertBackend]]:
    return [component("megablocks", MegaBlocksOptions, MegaBlocksBackend)]
