"""Memory of a training step, predicted from the config alone; nothing is allocated.

The model runs once on fake tensors, which have shapes but no data, while everything that autograd saves is
counted. So a plugin's router, loss or attention is counted as it is, not by a formula of someone else's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moelab.builder import build_balance_losses, build_model
from moelab.config.model import ModelConfig
from moelab.config.run import OptimizerConfig
from moelab.errors import ConfigError
from moelab.hookspecs import OPTIMIZERS
from moelab.kernels.onednn import alone_from, rounded_sizes
from moelab.nn.compiler_cache import ensure_compiler_cache
from moelab.nn.count import cached_numbers, moe_blocks
from moelab.nn.loss import chunk_rows, keeps_logits
from moelab.nn.low_rank import Target, adapter_targets, train_alone
from moelab.nn.names import stop_training
from moelab.nn.narrow import narrow
from moelab.nn.optimizing import OptimizerContext, each, kept_of, trained_parameters
from moelab.nn.room import MOMENTS
from moelab.nn.transformer import Transformer
from moelab.planning.machine import Machine
from moelab.planning.saved import Saved, count_saved
from moelab.planning.times import Times, times_of
from moelab.planning.traffic import FP32, CommunicationPlan, Problem, Units, communication, counts_before, units_of
from moelab.registry import Registry

# A process that trains on a CPU, beside its tensors: measured with Python 3.11 and torch 2.13 (CPU) on Linux, 0.31 GB
# of mapped libraries and 0.13 GB of objects that malloc holds (modules, corpus, oneDNN's primitives).
CPU_PROCESS = 440_000_000
# And where experts compute in bf16: 180 MB in every run that was measured, of 32 to 127 million parameters, on one
# process and on two, before small experts were padded further, and 310 to 380 MB in three runs since, of 16 to 47
# million. Probably what oneDNN keeps of products whose shapes are ever new.
CPU_BF16_EXPERTS = 300_000_000
# And where experts are multiplied one by one in fp32 (AMD's Zen 5): what each number of rows that oneDNN has met costs,
# 0.5 MB for each of six products, and places between that nothing fits in: 5 to 12 MB in runs that met 29 to 88.
CPU_ROWS = 10_000_000
MOST_ROWS = 4  # times the mean of an expert's, that a run meets before loads are balanced
# And with train.compile what torch's compiler is and holds: 83 to 108 MB more than eager runs of 0.3 million parameters
# took, its files cached or not.
CPU_COMPILER = 110_000_000
FROZEN = "train.freeze"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Autograd frees activations while it makes gradients, so that a perfect allocator would need room for the larger of
    the two; so does CUDA's, which keeps sizes apart (not measured). malloc does not: what is freed in pieces, between
    what stays, has no hole for the gradient of a whole bank, and the process grows by both. Measured resident sets of
    eight CPU runs of 68 to 280 million parameters (dense and MoE, fp32 and bf16, 512 and 4,096 tokens; docs/compute.md)
    are 0.97 to 1.02 of this sum, and 1.18 to 1.55 of what the larger of the two would predict.
    Where oneDNN multiplies experts one by one in fp32 (AMD's Zen 5), what it keeps hangs on the loads that a run meets;
    twelve runs of 16 to 47 million parameters were 0.92 to 1.04 of this sum.

    Of several processes the same heap has no place for a gathered layer where the one before lay, since activations lie
    there now: resident sets grew by each layer about twice (benchmarks/results/memory_per_rank.md; with large blocks
    mapped one by one they are those of the tensors). That is a fit to one size, and held on another.
    """

    parameters: int
    gradients: int
    optimizer: int
    weights_in_use: int  # copies that matmuls read: cast, or gathered from other devices
    activations: int  # kept from the forward pass for the backward pass
    working: int  # the layer that is being computed
    passing: int = 0  # gathered in all passes of a step and freed again, layer after layer
    added: int = 0  # gradients of a later micro-batch, freed when they are added to those of the first
    twice: int = 0  # of the last gradient: a tied table's, before what both its uses gave is added
    # Beside all activations: the head's gradient, those of an earlier micro-batch, and what the loss computes.
    first: int = 0
    last: int = 0  # beside all gradients: `twice`, and what the first layer computes
    process: int = 0  # of a CPU, what the process holds beside its tensors
    saving: int = 0  # copies of what a checkpoint holds, while it is written behind the run; of a CPU
    heap: bool = False  # malloc's, which can't give the place of freed activations to gradients

    @property
    def tensors(self) -> int:
        """The most bytes of tensors alive at once: activations shrink while gradients grow."""
        return self.parameters + self.optimizer + self.weights_in_use + self._together

    @property
    def _together(self) -> int:
        """Before the backward pass frees an activation, or when it has made the last gradient."""
        return max(self.activations + self.first, self.gradients + self.last)

    @property
    def unused(self) -> int:
        """What was freed between what stays, so that nothing of its size fits there: activations, gathered layers.

        Gradients of a later micro-batch come and go one by one, but the heap grew by about all of them (0.96 to 1.04
        of the plan on one process; benchmarks/memory.py). Over several processes that was not measured.
        """
        if not self.heap:
            return 0
        grown = self.activations + self.gradients + self.twice + self.added + self.working
        return max(grown - self._together, 0) + self.passing

    @property
    def peak(self) -> int:
        """Memory that the device must have: on a CPU the resident set of the process."""
        return self.tensors + self.unused + self.process + self.saving


@dataclass(frozen=True)
class Plan:
    """What `moelab plan` prints."""

    problem: Problem
    memory: MemoryPlan
    communication: CommunicationPlan
    total_parameters: int
    trained: int  # numbers that the optimizer steps
    times: Times | None  # of a step, on a machine that is known
    cached: int  # numbers that generation keeps of each token
    longest: int  # tokens of the model's longest sequence


def predict(
    config: ModelConfig, problem: Problem, registry: Registry | None = None, machine: Machine | None = None
) -> Plan:
    """The plan of `config` on `problem`, and how long a step takes on `machine`.

    Raises ConfigError for a mesh that can't be, and where the parts can't be counted without data.
    """
    registry = registry or Registry()
    counted = count(config, problem, registry)
    losses = build_balance_losses(config, registry)
    times = times_of(counted.model, problem, counted.sent, machine, counts_before(problem, losses)) if machine else None
    total = sum(parameter.numel() for parameter in counted.model.parameters())
    trained = sum(p.numel() for p in counted.model.parameters() if p.requires_grad)
    trained = sum(target.numbers for target in counted.targets) or trained
    memory, cached = counted.memory(problem), cached_numbers(counted.model)
    return Plan(problem, memory, counted.sent, total, trained, times, cached, config.max_position_embeddings)


@dataclass(frozen=True)
class Counted:
    """A model that has run once on tensors without data."""

    model: Transformer  # whose tensors have no data
    sent: CommunicationPlan
    saved: Saved
    targets: Sequence[Target]  # of adapters, which alone are trained; none: everything is
    state: int  # bytes that the optimizer holds on one device

    def memory(self, problem: Problem) -> MemoryPlan:
        """Of the problem that was counted, or of one that keeps less of it: checkpointing, recompute_logits."""
        memory = replace(_memory(self.model, problem, self.saved), optimizer=self.state)
        memory = _adapted(memory, problem, self.targets) if self.targets else memory
        copied = problem.saves_behind and memory.heap
        return replace(memory, saving=memory.parameters + memory.optimizer if copied else 0)


def count(config: ModelConfig, problem: Problem, registry: Registry) -> Counted:
    """What a micro-batch of `problem` keeps. Raises ConfigError as `predict` does."""
    problem.parallel.check()
    losses = build_balance_losses(config, registry)
    ensure_compiler_cache()
    with FakeTensorMode():
        model = build_model(config, registry, seed=None)
        _check_dealt(model, problem)
        sent = communication(model, problem, losses)  # before other backends stand there, to be counted
        if problem.kept == torch.bfloat16:
            narrow(model)
        stop_training(model, problem.frozen, FROZEN)
        targets = adapter_targets(model, problem.adapters)
        if targets:
            train_alone(model, targets)
        return Counted(model, sent, count_saved(model, problem, losses), targets, _state(model, problem, registry))


def _check_dealt(model: Transformer, problem: Problem) -> None:
    for block in moe_blocks(model):
        if block.layout.num_experts % problem.parallel.expert:
            raise ConfigError(
                f"parallel.expert: {problem.parallel.expert} does not divide the {block.layout.num_experts} experts of "
                f"layer {block.layer_id}; take a number that divides those of all layers"
            )


def _memory(model: Transformer, problem: Problem, saved: Saved) -> MemoryPlan:
    units, mesh, layers = units_of(model, problem.parallel), problem.parallel, len(model.layers)
    held = (units.root + sum(units.layers)) // mesh.shard + sum(units.banks) // problem.copies
    again = [problem.recomputes(index) for index in range(layers)]
    stream = problem.tokens * model.config.hidden_size * FP32  # what a layer that is computed again keeps: its input
    of_layers = [stream if twice else own for twice, own in zip(again, saved.layers, strict=True)]
    keeps = keeps_logits(problem.tokens * model.config.vocab_size, problem.recompute_logits)
    logits = saved.logits if keeps else 0
    # Gradients of one layer's activations, about half of which live at once; and the layer itself if recomputed.
    computed = [own // 2 + (own if twice else 0) for twice, own in zip(again, saved.layers, strict=True)]
    adds_up = problem.micro_batches > 1 and problem.keeps_whole_gradients
    alone = mesh.world == 1
    # Of one device, which alone keeps anything narrower than fp32.
    spared = sum((FP32 - parameter.element_size()) * parameter.numel() for parameter in model.parameters())
    gradients = FP32 * (units.whole if adds_up else held) - spared - _idle(model, problem)
    head, tied = model.lm_head.weight, model.lm_head.weight is model.embed_tokens.weight
    of_head = alone and head.requires_grad  # summed up in fp32, of products that are narrow
    twice = head.nbytes if of_head and tied else 0
    summed = head.numel() * (FP32 + (problem.dtype.itemsize if problem.dtype != torch.float32 else 0))
    loss, reduced = _of_loss(model, problem, keeps), _whole_gradients(units, problem)
    anew = alone and not adds_up and not problem.adapters  # gradients come beside what a layer no longer keeps
    made = [sum(p.nbytes for p in layer.parameters() if p.requires_grad and anew) for layer in model.layers]
    # No less than the largest layer's: where nothing else stands beside it, the plan was 0.84 of what was measured.
    first = max(loss, _beside(of_layers, computed, made) - logits, *computed)
    first += (summed if of_head else 0) + (gradients if adds_up else 0)
    return MemoryPlan(
        parameters=FP32 * held - spared,
        gradients=gradients,
        optimizer=0,
        weights_in_use=(saved.casts if not all(again) else saved.cached) + _whole(units, problem),
        activations=sum(of_layers) + saved.outside + logits,
        working=max(*computed, loss) + reduced,
        passing=_passing(units, problem),
        added=gradients if adds_up and alone else 0,
        twice=twice,
        first=first + reduced,
        last=computed[0] + twice + reduced,
        process=_process(model, problem),
        heap=problem.device == "cpu",
    )


def _beside(kept: Sequence[int], computed: Sequence[int], made: Sequence[int]) -> int:
    """The most bytes beside what is `kept` of all layers while the backward pass goes through them.

    At each what is `computed` there; what those above it kept is gone, and their gradients are `made`.
    """
    most = grown = 0
    for own, at_once, gradients in reversed(list(zip(kept, computed, made, strict=True))):
        most = max(most, grown + at_once)
        grown += gradients - own
    return most


def _idle(model: Transformer, problem: Problem) -> int:
    """Bytes of gradients that parameters which are not trained don't have, where gradients are kept: cut or whole."""
    mesh, routed = problem.parallel, {id(p) for block in moe_blocks(model) for p in block.experts.parameters()}
    adds_up = problem.micro_batches > 1 and problem.keeps_whole_gradients
    parts = {True: mesh.expert, False: 1} if adds_up else {True: mesh.shard, False: mesh.shard}
    idle = (parameter for parameter in model.parameters() if not parameter.requires_grad)
    return sum(parameter.nbytes // parts[id(parameter) in routed] for parameter in idle)


def _of_loss(model: Transformer, problem: Problem, keeps: bool) -> int:
    """Bytes that the loss takes for a piece of the logits: probabilities in fp32, their gradient, and the logits."""
    rows = min(problem.tokens, chunk_rows(model.config.vocab_size, problem.device))
    narrow_ones = problem.dtype.itemsize if problem.dtype != torch.float32 else 0
    each = FP32 + narrow_ones + (0 if keeps else problem.dtype.itemsize)
    return rows * model.config.vocab_size * each


def _state(model: Transformer, problem: Problem, registry: Registry) -> int:
    """Bytes that the optimizer holds on one device, as it says itself.

    Numbers of the banks and of the rest are shared out over different devices. Raises ConfigError as it is built.
    """
    settings = OptimizerConfig(dict(problem.algorithm), moments_dtype=str(problem.moments).removeprefix("torch."))
    context = OptimizerContext(trained_parameters(model, {}), settings, problem.parallel.world, bool(problem.adapters))
    optimizer = registry.build(OPTIMIZERS, settings.algorithm, context, OPTIMIZERS.key)
    routed = {id(parameter) for block in moe_blocks(model) for parameter in block.experts.parameters()}
    units, found = units_of(model, problem.parallel), {True: [0, 0], False: [0, 0]}
    for parameter in model.parameters():
        found[id(parameter) in routed][0] += parameter.numel()
    for group, _, parameter in each(optimizer):
        sums = found[id(parameter) in routed]
        sums[1] += parameter.numel() * kept_of(optimizer, group).bytes_each
    parts = {
        True: sum(units.banks) // problem.copies,
        False: (units.root + sum(units.layers)) // problem.parallel.shard,
    }
    return sum(held * found[which][1] // found[which][0] for which, held in parts.items() if found[which][0])


def _adapted(memory: MemoryPlan, problem: Problem, targets: Sequence[Target]) -> MemoryPlan:
    """Of a model whose adapters alone are trained: `base` beside each sum, and one gradient of a sum at a time."""
    numbers, bases = sum(t.numbers for t in targets), [t.parameter.numel() for t in targets]
    return replace(
        memory,
        parameters=memory.parameters + FP32 * (numbers + sum(bases)),
        gradients=FP32 * numbers,
        optimizer=MOMENTS * problem.moments.itemsize * numbers,
        working=memory.working + FP32 * max(bases),
        added=0,
        first=memory.first + FP32 * max(bases) + (FP32 * numbers - memory.gradients if memory.added else 0),
        twice=0,
        last=memory.last - memory.twice + FP32 * max(bases),
    )


def _process(model: Transformer, problem: Problem) -> int:
    if problem.device != "cpu":
        return 0
    experts = problem.dtype != torch.float32 and any(True for _ in moe_blocks(model))
    held = CPU_BF16_EXPERTS if experts else _row_numbers(model, problem) * CPU_ROWS
    return CPU_PROCESS + held + (CPU_COMPILER if problem.compiled else 0)


def _row_numbers(model: Transformer, problem: Problem) -> int:
    """How many numbers of rows the experts that are multiplied alone in fp32 are likely to have, of each size."""
    found = set()
    for block in moe_blocks(model):
        if problem.dtype == torch.float32 and getattr(block.backend, "fused", False):
            layout, matrix = block.layout, block.experts.down[0]
            mean, least = problem.tokens * layout.num_experts_per_tok // layout.num_experts, alone_from(matrix.numel())
            if mean >= least:  # below, few experts get there
                found |= {(matrix.shape, rows) for rows in rounded_sizes(least, MOST_ROWS * mean)}
    return len(found)


def _whole(units: Units, problem: Problem) -> int:
    """Bytes of gathered parameters: what is not cut again before the backward pass, a layer, and one fetched ahead."""
    if problem.parallel.world == 1:
        return 0
    if not problem.parallel.reshard_after_forward:
        return FP32 * units.whole
    return FP32 * (units.root + 2 * units.largest)


def _passing(units: Units, problem: Problem) -> int:
    """Bytes that are gathered and freed: each layer twice, or once where it stays, in the piece that all came in."""
    if problem.parallel.world == 1:
        return 0
    times = 2 if problem.parallel.reshard_after_forward else 1
    return times * FP32 * (sum(units.layers) + sum(units.banks))


def _whole_gradients(units: Units, problem: Problem) -> int:
    """Bytes of gradients before they are reduced, their copies in the order of the devices, and on gloo what comes."""
    if problem.parallel.world == 1:
        return 0
    copies = 3 if problem.device == "cpu" and problem.parallel.shard > 1 else 2
    return FP32 * copies * max(units.root, units.largest)
