"""What a process hands to its collectives, counted where they are called: of tests and benchmarks.

A dispatch mode sees every operator of a step, backward and FSDP's own included. Counted is what a ring sends of it:
(n - 1) / n of what is gathered or reduced, twice that of a sum, and the rows that go to others.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import moelab
from moelab.builder import build_balance_losses
from moelab.config.model import ModelConfig
from moelab.config.run import ParallelConfig
from moelab.data.batches import Batch
from moelab.moe.routing import Routing
from moelab.nn.checkpointing import apply_activation_checkpointing
from moelab.nn.count import moe_blocks
from moelab.nn.transformer import Transformer
from moelab.parallel.group import Group
from moelab.parallel.mesh import Meshes, make_meshes
from moelab.parallel.parallelise import parallelise
from moelab.planning.traffic import EXCHANGE, GATHER, REDUCE, SUM, Problem, communication, counts_before
from moelab.training.precision import Precision
from moelab.training.step import StepSettings, train_step


@dataclass
class Counted:
    """Bytes that this process sent in all calls of one kind, and how many there were that reach another process."""

    sent: float = 0.0
    calls: int = 0


@dataclass
class Collectives(TorchDispatchMode):
    """`with Collectives() as seen: step()`; then seen.by_kind."""

    by_kind: dict[str, Counted] = field(default_factory=lambda: defaultdict(Counted))

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator, and counts it where it is a collective's."""
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if "c10d" in name and "autograd" not in name:
            self._count(name, args)
        return result

    def _count(self, name: str, args: Any) -> None:
        flat = [x for arg in args for x in (arg if isinstance(arg, list) else [arg])]
        tensors = [x for x in flat if isinstance(x, Tensor)]
        if "all_to_all_single" in name:
            ranks = dist.distributed_c10d._resolve_process_group(args[3]).size()
            rank, rows = dist.get_rank(dist.distributed_c10d._resolve_process_group(args[3])), args[2]
            own = rows[rank] * tensors[0][0].nbytes if rows else tensors[0].nbytes // ranks
            self._add(EXCHANGE, ranks, tensors[0].nbytes - own)
            return
        kind = next((kind for part, kind in _KINDS.items() if part in name), None)
        if kind is None:
            return
        group = next(x for x in args if isinstance(x, torch.ScriptObject))
        ranks = dist.ProcessGroup.unbox(group).size()
        whole = max(x.nbytes for x in tensors)
        self._add(kind, ranks, (2 if kind == SUM else 1) * whole * (ranks - 1) / ranks)

    def _add(self, kind: str, ranks: int, sent: float) -> None:
        if ranks > 1:
            self.by_kind[kind].sent += sent
            self.by_kind[kind].calls += 1


# On gloo a reduce-scatter is an all-to-all and a sum, and rows of tokens go by the functional one.
_KINDS = {"_allgather_base_": GATHER, "alltoall_base_": REDUCE, "allreduce_": SUM}


@dataclass(frozen=True)
class Case:
    """A step: `batch` sequences over all ranks, in micro-batches of `micro`."""

    parallel: dict[str, Any]
    batch: int
    micro: int
    length: int
    dtype: torch.dtype = torch.float32
    checkpointing: int = 0

    @property
    def mesh(self) -> ParallelConfig:
        return ParallelConfig(**self.parallel)

    def __str__(self) -> str:
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.parallel.items()) or "alone"
        again = f", every {self.checkpointing}. layer twice" if self.checkpointing else ""
        micro, dtype = self.problem().micro_batches, str(self.dtype).removeprefix("torch.")
        return f"{mesh}; {micro} x {self.micro} x {self.length}, {dtype}{again}"

    def problem(self) -> Problem:
        """As `moelab plan` takes it."""
        each = self.batch // self.micro // self.mesh.world
        return Problem(self.micro, self.length, self.dtype, "cpu", self.mesh, each, self.checkpointing)


def counted_steps(config: ModelConfig, cases: list[Case]) -> list[dict[str, list[float]]]:
    """On each rank, of each case's second step: {kind: [sent by the formula, as declared, counted, calls by the
    formula, calls counted]}. The formula is given the rows that leave; what is declared has them leave evenly."""
    registry = moelab.Registry(entry_points=False)
    found = []
    for case in cases:
        plain = moelab.build_model(config, registry, device="meta", seed=None)
        losses = build_balance_losses(config, registry)
        model, ranks = moelab.build_model(config, registry, seed=1), Group(config=case.mesh)
        if case.checkpointing:
            apply_activation_checkpointing(model, case.checkpointing)
        meshes = make_meshes(case.mesh, ranks.size, "cpu")
        parallelise(model, meshes, losses, reshard_after_forward=case.mesh.reshard_after_forward)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        settings = StepSettings(case.micro, 1.0, 0, Precision(torch.device("cpu"), case.dtype))
        train_step(model, optimizer, losses, batch_of(config, case, 0), 0, settings, ranks=ranks)
        leaving = _count_leaving(model, meshes)
        with Collectives() as seen:
            train_step(model, optimizer, losses, batch_of(config, case, 1), 1, settings, ranks=ranks)
        problem = case.problem()
        extra = counts_before(problem, losses)
        sparse = [index for index, layer in enumerate(plain.layers) if layer in _sparse(plain)]
        once = [rows / (1 + extra + problem.recomputes(index)) for rows, index in zip(leaving, sparse, strict=True)]
        exact = communication(plain, problem, losses, once).collectives
        even = communication(plain, problem, losses).collectives
        found.append(
            {
                kind: [
                    sum(one.sent for one in exact if one.kind == kind),
                    sum(one.sent for one in even if one.kind == kind),
                    seen.by_kind[kind].sent,
                    sum(one.calls for one in exact if one.kind == kind),
                    seen.by_kind[kind].calls,
                ]
                for kind in (GATHER, REDUCE, SUM, EXCHANGE)
            }
        )
    return found


def _sparse(model: Transformer) -> list[nn.Module]:
    blocks = set(moe_blocks(model))
    return [layer for layer in model.layers if layer.mlp in blocks]


def _count_leaving(model: Transformer, meshes: Meshes) -> list[int]:
    """For each MoE layer the assignments that go to another rank, counted whenever it is computed from now on."""
    ranks, rank = meshes.expert.size(), meshes.expert.get_local_rank()
    leaving = [0] * len(list(moe_blocks(model)))

    for place, block in enumerate(moe_blocks(model)):
        each = block.layout.num_experts // ranks

        def count(bank: nn.Module, arguments: Any, place: int = place, each: int = each) -> None:
            routing: Routing = arguments[1]
            leaving[place] += int((routing.expert // each != rank).sum())

        block.experts.register_forward_pre_hook(count)
    return leaving


def batch_of(config: ModelConfig, case: Case, step: int) -> Batch:
    """The whole batch of a step, without padding."""
    stream = torch.Generator().manual_seed(step)
    ids = torch.randint(0, config.vocab_size, (case.batch, case.length + 1), generator=stream)
    same = torch.arange(case.batch)[:, None].expand(case.batch, case.length).contiguous()
    mask = torch.ones_like(same, dtype=torch.bool)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), same, torch.zeros_like(same), mask)
