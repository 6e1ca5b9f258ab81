"""The readable reference: one expert after the other, in any dtype, float64 included."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import BackendContext, Component, ExpertBackend, Routing, component, hookimpl
from moelab.moe.contracts import ExpertProblem
from moelab.moe.dispatch import combine_rows, dispatch_plan, gather_rows
from moelab.moe.experts import ExpertBank, add_down_bias, compute_dtype


@dataclass
class LoopOptions:
    pass


class LoopBackend:
    """Two plain matmuls an expert. Waits for the device to learn how many rows each expert has."""

    name = "loop"

    def __init__(self, options: LoopOptions, context: BackendContext) -> None:
        pass

    def supports(self, problem: ExpertProblem) -> str | None:
        return None

    def __call__(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        """x [T, D] -> [T, D]."""
        dtype = compute_dtype(x)
        plan = dispatch_plan(routing)
        rows = gather_rows(x.to(dtype), plan)
        # unbind: indexing the bank would cost a full-size gradient for each expert in the backward pass.
        gate_up, down = bank.gate_up.to(dtype).unbind(0), bank.down.to(dtype).unbind(0)
        pieces = rows.split(plan.counts.tolist())
        pre = [piece @ matrix.t() for piece, matrix in zip(pieces, gate_up, strict=True)]
        if bank.gate_up_bias is not None:
            pre = [rows + bias for rows, bias in zip(pre, bank.gate_up_bias.to(dtype).unbind(0), strict=True)]
        outputs = [bank.activate(rows) @ matrix for rows, matrix in zip(pre, down, strict=True)]
        y = combine_rows(torch.cat(outputs), routing.weight, plan)
        return add_down_bias(y, routing, bank).to(x.dtype)


@hookimpl
def moelab_expert_backends() -> list[Component[BackendContext, ExpertBackend]]:
    return [component("loop", LoopOptions, LoopBackend)]
