"""All experts in two calls of torch's grouped matmul. No host synchronisation on CUDA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import BackendContext, Component, ExpertBackend, Routing, component, hookimpl
from moelab.moe.contracts import ExpertProblem
from moelab.moe.dispatch import combine_rows, dispatch_plan, gather_rows
from moelab.moe.experts import ExpertBank, add_down_bias, add_up_bias, compute_dtype

STRIDE_BYTES = 16  # torch.nn.functional.grouped_mm wants every row stride to be a multiple


@dataclass
class GroupedMMOptions:
    pass


class GroupedMMBackend:
    """torch.nn.functional.grouped_mm over rows sorted by expert."""

    name = "grouped_mm"

    def __init__(self, options: GroupedMMOptions, context: BackendContext) -> None:
        pass

    def supports(self, problem: ExpertProblem) -> str | None:
        if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"takes float32, bfloat16 and float16, not {problem.dtype}; use loop"
        unit = STRIDE_BYTES // problem.dtype.itemsize
        if problem.hidden_size % unit or problem.moe_intermediate_size % unit:
            return f"hidden_size and moe_intermediate_size must be multiples of {unit} in {problem.dtype}; use loop"
        return None

    def __call__(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        """x [T, D] -> [T, D]."""
        dtype = compute_dtype(x)
        plan = dispatch_plan(routing)
        offsets = plan.counts.cumsum(0, dtype=torch.int32)
        rows = gather_rows(x.to(dtype), plan)
        pre = torch.nn.functional.grouped_mm(rows, bank.gate_up.to(dtype).transpose(1, 2), offs=offsets)
        if bank.gate_up_bias is not None:
            pre = add_up_bias(pre, routing.expert.index_select(0, plan.order), bank)
        out = torch.nn.functional.grouped_mm(bank.activate(pre), bank.down.to(dtype), offs=offsets)
        return add_down_bias(combine_rows(out, routing.weight, plan), routing, bank).to(x.dtype)


@hookimpl
def moelab_expert_backends() -> list[Component[BackendContext, ExpertBackend]]:
    return [component("grouped_mm", GroupedMMOptions, GroupedMMBackend)]
