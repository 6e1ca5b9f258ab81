"""Experts of like load in one batched product: what measures fastest on a CPU.

The whole expert MLP is one autograd node, whatever the activation. It keeps x and the gate_up rows for the backward
pass and recomputes the rest chunk by chunk; weight gradients are written in place, without a copy. An activation that
differentiates itself costs no more than its own passes; another one is left to autograd, with a copy more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moelab import BackendContext, Component, ExpertBackend, Routing, component, hookimpl
from moelab.derivatives import first_order
from moelab.moe.activation import Activation, differentiate, num_inputs
from moelab.moe.contracts import ExpertProblem
from moelab.moe.dispatch import dispatch_plan, sum_rows
from moelab.moe.experts import ExpertBank, add_down_bias, compute_dtype
from moelab_plugins.expert_backends._batched_rows import Rows, lay_out, make_chunks


@dataclass
class BatchedOptions:
    pass


class BatchedBackend:
    """Neighbouring experts padded to one number of rows, and multiplied at once."""

    name = "batched"
    keeps_gate_up_alone = True  # for the backward pass; see moelab.planning.saved

    def __init__(self, options: BatchedOptions, context: BackendContext) -> None:
        pass

    def supports(self, problem: ExpertProblem) -> str | None:
        if problem.device.type != "cpu":
            return f"runs on the CPU only, not on {problem.device.type}; use grouped_mm"
        return None

    def __call__(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        """x [T, D] -> [T, D]."""
        dtype = compute_dtype(x)
        gate_up, down = bank.gate_up.to(dtype), bank.down.to(dtype)
        rows = lay_out(routing, dispatch_plan(routing), down)
        bias = None if bank.gate_up_bias is None else bank.gate_up_bias.to(dtype)
        y: Tensor = _ExpertMLP.apply(x.to(dtype), routing.weight, gate_up, down, bias, rows, bank.activation)
        return add_down_bias(y, routing, bank).to(x.dtype)


class _ExpertMLP(torch.autograd.Function):
    """y[t] = sum over t's assignments of weight * down(activation(gate x_t + b, up x_t + b))."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gate_up: Tensor,
        down: Tensor,
        bias: Tensor | None,
        rows: Rows,
        activation: Activation,
    ) -> Tensor:
        hidden = x.new_empty(rows.token.numel(), gate_up.shape[1])  # [R, M F]
        out = x.new_empty(rows.token.numel(), x.shape[1])  # [R, D]

        for chunk in make_chunks(rows.runs, x.dtype):
            pre = hidden[chunk.rows]
            chunk.multiply(x.index_select(0, rows.token[chunk.rows]), gate_up.transpose(1, 2), pre)
            if bias is not None:
                chunk.add(bias, pre)
            act = activation(*pre.chunk(num_inputs(activation), 1))
            chunk.multiply(act, down, out[chunk.rows])

        row_weight = weight.new_zeros(rows.token.numel()).index_copy_(0, rows.slot, weight)
        ctx.save_for_backward(x, row_weight, gate_up, down, hidden)
        ctx.rows, ctx.activation, ctx.has_bias = rows, activation, bias is not None
        return sum_rows(out, rows.by_token, rows.starts, row_weight)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, row_weight, gate_up, down, hidden = ctx.saved_tensors
        rows: Rows = ctx.rows
        grad_y = grads[0].contiguous()
        scale = row_weight.to(x.dtype).unsqueeze(-1)  # [R, 1]
        grad_row_weight = torch.empty_like(row_weight)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        grad_bias = gate_up.new_empty(gate_up.shape[:2]) if ctx.has_bias else None
        grad_rows = x.new_empty(rows.token.numel(), x.shape[1])
        parts = num_inputs(ctx.activation)

        for chunk in make_chunks(rows.runs, x.dtype):
            token = rows.token[chunk.rows]
            inputs, spread = x.index_select(0, token), grad_y.index_select(0, token)  # [r, D]
            pre = hidden[chunk.rows]
            grad_act = inputs.new_empty(inputs.shape[0], down.shape[1])
            chunk.multiply(spread, down.transpose(1, 2), grad_act)
            act, pullback = differentiate(ctx.activation, *pre.chunk(parts, 1))
            # <dy, down act> = <down^T dy, act>: the routing weight's gradient without keeping the output rows.
            torch.sum(grad_act * act, 1, dtype=row_weight.dtype, out=grad_row_weight[chunk.rows])
            act.mul_(scale[chunk.rows])
            chunk.outer(act, spread, grad_down)
            grad_act.mul_(scale[chunk.rows])
            grad_pre = torch.empty_like(pre)
            pullback(grad_act, *grad_pre.chunk(parts, 1))
            if grad_bias is not None:
                chunk.total(grad_pre, grad_bias)
            chunk.outer(grad_pre, inputs, grad_gate_up)
            chunk.multiply(grad_pre, gate_up, grad_rows[chunk.rows])

        grad_x = sum_rows(grad_rows, rows.by_token, rows.starts)
        grad_weight = grad_row_weight.index_select(0, rows.slot)
        return grad_x, grad_weight, grad_gate_up, grad_down, grad_bias, None, None


@hookimpl
def moelab_expert_backends() -> list[Component[BackendContext, ExpertBackend]]:
    return [component("batched", BatchedOptions, BatchedBackend)]
