"""What a device sends in a training step: a step's problem, and each of its collectives, from sizes alone.

The collectives are those that `moelab.parallel` and FSDP2 make, and are held against counted ones by
`benchmarks/collective_bytes.py` and `tests/unit/core/planning/test_traffic.py`:

    parameters  a unit (a layer; where experts are dealt out, a layer without them and those of it that lie here;
                embedding, norm and head) is gathered for each forward and each backward pass, the last one once for
                both; with `parallel.reshard_after_forward: false` each of them once a step. Rows are padded to a
                multiple of the devices, tensor by tensor
    gradients   are reduced after the last micro-batch, or with `parallel.accumulate: pieces` after each
    replicas    add the reduced gradients, after the last micro-batch
    tokens      rows go to their experts and back, forward and backward; a layer that is computed again sends them
                there and back once more, and gathers nothing more. Before them go E counts. A backend that computes
                every expert sends each token's row to each of them and back, forward
    sums        counts, losses, the gradient's norm: hundreds of bytes
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moelab.config.adapters import AdapterConfig
from moelab.config.run import ParallelConfig
from moelab.moe.balance import NamedLoss
from moelab.moe.block import MoEBlock
from moelab.nn.count import expected_assignments, moe_blocks
from moelab.nn.transformer import Transformer

GATHER, REDUCE, SUM, EXCHANGE = "all-gather", "reduce-scatter", "all-reduce", "all-to-all"
PARAMETERS, GRADIENTS, REPLICAS, TOKENS, SUMS = "parameters", "gradients", "replicas", "tokens", "sums"
FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Problem:
    """What runs on each device."""

    sequences: int  # of one micro-batch
    sequence_length: int
    dtype: torch.dtype = torch.float32  # of the matmuls
    device: str = "cuda"  # or cpu
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro_batches: int = 1  # of a device in a step
    checkpointing: int = 0  # each n-th layer is computed again in the backward pass; 0: none
    kept: torch.dtype = torch.float32  # of matrices and their gradients between steps; of one device
    moments: torch.dtype = torch.float32  # of AdamW's state; of one device
    adapters: Sequence[AdapterConfig] = ()  # which alone are trained; none: all parameters are. Of one device
    frozen: Sequence[str] = ()  # patterns over names of parameters that are not trained
    compiled: bool = False  # parts of the layers, by torch.compile
    saves_behind: bool = False  # checkpoints are copied, and written while the run goes on
    recompute_logits: bool | None = None  # in the backward pass; None: where there are very many
    algorithm: Mapping[str, Any] = field(default_factory=lambda: {"name": "adamw"})  # of the optimizer

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length

    @property
    def copies(self) -> int:
        """Devices among which the experts of one owner are cut."""
        return self.parallel.shard // self.parallel.expert

    @property
    def keeps_whole_gradients(self) -> bool:
        """Whether gradients add up on each device, whole, until the last micro-batch is done."""
        return self.parallel.world == 1 or self.parallel.accumulate == "whole"

    def recomputes(self, layer: int) -> bool:
        """Whether layer number `layer` is computed twice."""
        return self.checkpointing > 0 and layer % self.checkpointing == 0


@dataclass(frozen=True)
class Collective:
    """Equal calls of one operation, in each of many groups of devices at once."""

    what: str
    kind: str
    ranks: int  # devices of a group
    stride: int  # from one of them to the next: devices are numbered replica by replica, an expert group in a run
    size: float  # bytes of all calls: of what is gathered, reduced or summed, or of all that a device exchanges
    calls: int  # that reach the wire one after the other

    @property
    def sent(self) -> float:
        """Bytes that a device sends, as rings do: (n - 1) / n of the whole, and twice that for a sum.

        These are the factors of nccl-tests' PERFORMANCE.md (bus bandwidth).
        """
        return (2 if self.kind == SUM else 1) * self.size * (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class CommunicationPlan:
    """All collectives of a step."""

    collectives: tuple[Collective, ...]

    def of(self, what: str) -> float:
        """Bytes that one device sends for `what`."""
        return sum(found.sent for found in self.collectives if found.what == what)

    @property
    def total(self) -> float:
        return sum(found.sent for found in self.collectives)


@dataclass(frozen=True)
class Units:
    """Elements of what is gathered at once, each parameter's rows padded to a multiple of the devices."""

    root: int
    layers: tuple[int, ...]  # without their routed experts
    banks: tuple[int, ...]  # of each layer: the experts that lie on one device or are cut with others; 0 in a dense one

    @property
    def whole(self) -> int:
        """All that passes through one device."""
        return self.root + sum(self.layers) + sum(self.banks)

    @property
    def largest(self) -> int:
        """A layer with its experts."""
        return max(layer + bank for layer, bank in zip(self.layers, self.banks, strict=True))


def units_of(model: Transformer, parallel: ParallelConfig) -> Units:
    """As `moelab.parallel.parallelise` cuts it."""
    layers, banks = [], []
    for layer in model.layers:
        routed = list(layer.mlp.experts.parameters()) if isinstance(layer.mlp, MoEBlock) else []
        own = {id(parameter) for parameter in routed}
        layers.append(_padded((p for p in layer.parameters() if id(p) not in own), parallel.shard))
        banks.append(_padded(routed, parallel.shard // parallel.expert, parallel.expert))
    inside = {id(parameter) for layer in model.layers for parameter in layer.parameters()}
    root = _padded((p for p in model.parameters() if id(p) not in inside), parallel.shard)
    return Units(root, tuple(layers), tuple(banks))


def _padded(parameters: Iterable[nn.Parameter], ranks: int, dealt: int = 1) -> int:
    """Elements, of tensors whose rows are dealt out to `dealt` owners and then cut into `ranks` equal pieces."""
    total = 0
    for parameter in parameters:
        rows = parameter.shape[0] // dealt
        total += -(-rows // ranks) * ranks * parameter[0].numel()
    return total


def communication(
    model: Transformer,
    problem: Problem,
    losses: Sequence[NamedLoss] = (),
    leaving: Sequence[float] | None = None,
) -> CommunicationPlan:
    """The collectives of one step of a device on the mesh of `problem`.

    Tokens go to as many experts as the routers declare (`Router.expected_assignments`), evenly over all devices.
    `leaving`: instead, for each MoE layer, the rows of a step that go to others, of a mean device: one to whom more
    come than leave it sends more on the way back.
    """
    if problem.parallel.world == 1:
        return CommunicationPlan(())
    found = [*_of_units(model, problem, losses), *_of_tokens(model, problem, losses, leaving)]
    found += _of_sums(model, problem, losses)
    return CommunicationPlan(tuple(one for one in found if one.ranks > 1))


def counts_before(problem: Problem, losses: Sequence[NamedLoss]) -> bool:
    """Whether a pass without gradients counts the batch for its losses: the step's `_routing_pass`."""
    return problem.micro_batches > 1 and any(named.loss.needs_batch_counts for named in losses)


def _of_units(model: Transformer, problem: Problem, losses: Sequence[NamedLoss]) -> list[Collective]:
    mesh, units, micro = problem.parallel, units_of(model, problem.parallel), problem.micro_batches
    extra, reduced = counts_before(problem, losses), 1 if problem.keeps_whole_gradients else micro
    shard, copies = (mesh.shard, 1), (problem.copies, mesh.expert)
    # What the counting pass gathers of the root serves the first micro-batch too.
    of_root, of_layer = (micro, micro * (2 + extra)) if mesh.reshard_after_forward else (1, 1)
    sizes = [(units.root, of_root, shard)]
    for layer, bank in zip(units.layers, units.banks, strict=True):
        apart = bank if mesh.expert > 1 else 0
        sizes.append((layer + bank - apart, of_layer, shard))
        sizes += [(apart, of_layer, copies)] if apart else []
    found = [Collective(PARAMETERS, GATHER, *group, FP32 * size * calls, calls) for size, calls, group in sizes]
    for size, _, group in sizes:
        found.append(Collective(GRADIENTS, REDUCE, *group, FP32 * size * reduced, reduced))
        found.append(Collective(REPLICAS, SUM, mesh.replicate, mesh.shard, FP32 * size / group[0], 1))
    return found


def _of_tokens(
    model: Transformer, problem: Problem, losses: Sequence[NamedLoss], leaving: Sequence[float] | None
) -> list[Collective]:
    ranks, micro, extra = problem.parallel.expert, problem.micro_batches, counts_before(problem, losses)
    found: list[Collective] = []
    for place, block in enumerate(moe_blocks(model)):
        again = problem.recomputes(block.layer_id)
        if leaving is None:
            rows = micro * problem.tokens * expected_assignments(block).per_token
        else:
            rows = leaving[place] * ranks / (ranks - 1) if ranks > 1 else 0.0
        width = problem.dtype.itemsize * block.experts.hidden_size
        ways = 2 * (2 + again + extra)  # there and back: forward, backward, and what is computed besides
        found.append(Collective(TOKENS, EXCHANGE, ranks, 1, rows * width * ways, micro * ways))
        counted = micro * (1 + again + extra)
        if block.computes_every_expert:  # forward, and not where a pass merely counts
            shown, beside = micro * problem.tokens * block.layout.num_experts, 1 + again
            found.append(Collective(TOKENS, EXCHANGE, ranks, 1, shown * width * 2 * beside, micro * 2 * beside))
            counted += micro * beside
        found.append(Collective(TOKENS, EXCHANGE, ranks, 1, INT64 * block.layout.num_experts * counted, counted))
    return found


def _of_sums(model: Transformer, problem: Problem, losses: Sequence[NamedLoss]) -> list[Collective]:
    """Of a step that is not logged. What a router reports beside its counts is not known here, and small."""
    experts = [block.layout.num_experts for block in moe_blocks(model)]
    before = any(named.loss.needs_batch_counts for named in losses)
    passes = 1 + before  # with one micro-batch the counts of its own forward pass are added
    sizes = [INT64] * passes  # tokens
    sizes += [INT64 * count for count in experts] * passes
    sizes += [INT64 * sum(experts)] if experts else []  # served
    sizes += [FP32 * (2 + len(losses)), INT64]  # losses; the norm
    return [Collective(SUMS, SUM, problem.parallel.world, 1, sum(sizes), len(sizes))]
