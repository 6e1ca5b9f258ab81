"""Tokens to the ranks that own their experts, and back.

R ranks on the expert axis, E experts, E / R of them on each, T tokens of this rank, N assignments, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial

from moelab.moe.contracts import ExpertBackend, ExpertProblem
from moelab.moe.dispatch import combine_rows, dispatch_plan, gather_rows
from moelab.moe.experts import BankView, ExpertBank, compute_dtype
from moelab.moe.routing import Routing


class ExchangeBackend:
    """An expert backend around another one: rows go to their expert's owner, are computed there, and come back.

    Weights are applied at home, so that their gradient needs no exchange. Waits for the device once a layer: how many
    rows go where must be known to the host. Every rank calls it for every layer, tokens or none.
    """

    def __init__(self, inner: ExpertBackend, mesh: DeviceMesh) -> None:
        self.inner, self.mesh = inner, mesh
        self.name = inner.name

    def supports(self, problem: ExpertProblem) -> str | None:
        """What the inner backend says of this rank's own rows: how many will arrive is not known yet."""
        return self.inner.supports(problem)

    def __call__(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        """x [T, D] -> [T, D]."""
        ranks = self.mesh.size()
        plan = dispatch_plan(routing)
        there = plan.counts.view(ranks, -1)  # [R, E / R]: rows for each expert of each rank
        here = wait_tensor(all_to_all_single(there.contiguous(), None, None, self.mesh))  # [R, E / R]: from each rank
        send, receive = torch.stack([there.sum(1), here.sum(1)]).tolist()
        narrow = x.to(compute_dtype(x))  # as the inner backend will, and half the bytes where that is bf16
        rows = _exchange(gather_rows(narrow, plan), receive, send, self.mesh)
        out = self.inner(rows, _arrived(here, rows.shape[0]), _local(bank))
        back = _exchange(out, send, receive, self.mesh)
        return combine_rows(back, routing.weight, plan).to(x.dtype)


def _exchange(rows: Tensor, receive: list[int], send: list[int], mesh: DeviceMesh) -> Tensor:
    return wait_tensor(all_to_all_single(rows.contiguous(), receive, send, mesh))


def _arrived(here: Tensor, rows: int) -> Routing:
    """Each row that arrived goes to one expert of this rank, with weight one. here [R, E / R] counts them."""
    experts = here.shape[1]
    ids = torch.arange(experts, device=here.device).repeat(here.shape[0])
    expert = ids.repeat_interleave(here.flatten(), output_size=rows)
    weight = torch.ones(rows, 1, device=here.device)
    return Routing.from_topk(expert[:, None], weight, experts)


def whole_experts(bank: ExpertBank) -> tuple[Tensor, Tensor]:
    """(gate_up [E, M F, D], down [E, F, D]) of all ranks, inside the bank's forward pass; as tensors that outlive it.

    Each rank's gradient of them is a part of the whole: parts add up at the owner, as those of tokens do.
    """
    parts = (bank.gate_up, bank.down)
    gate_up, down = (
        part.full_tensor(grad_placements=[Partial()]) if isinstance(part, DTensor) else part.clone() for part in parts
    )
    return gate_up, down


def _local(bank: ExpertBank) -> ExpertBank:
    """The experts of this rank as plain tensors."""
    return BankView(bank, _own)


def _own(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor), "experts are not dealt out"
    local: Tensor = tensor.to_local()
    return local
