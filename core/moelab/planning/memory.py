"""Memory of a training step, predicted from the config alone; nothing is allocated.

The model runs once on fake tensors, which have shapes but no data, while everything that autograd saves is
counted. So a plugin's router, loss or attention is counted as it is, not by a formula of someone else's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from moelab.builder import build_balance_losses, build_model
from moelab.config.model import ModelConfig
from moelab.config.run import OptimizerConfig
from moelab.errors import ConfigError
from moelab.hookspecs import OPTIMIZERS
from moelab.moe.contracts import ExpertProblem, Router
from moelab.moe.dispatch import combine_rows, dispatch_plan, gather_rows
from moelab.moe.experts import ExpertBank, add_down_bias, add_up_bias, compute_dtype
from moelab.moe.routing import Routing, TokenInfo
from moelab.nn.attention import Attention
from moelab.nn.count import moe_blocks
from moelab.nn.full_attention import FullAttention, torch_attention
from moelab.nn.low_rank import Target, adapter_targets, train_alone
from moelab.nn.narrow import narrow
from moelab.nn.optimizing import OptimizerContext, each, kept_of, trained_parameters
from moelab.nn.room import MOMENTS
from moelab.nn.transformer import Transformer
from moelab.planning.machine import Machine
from moelab.planning.times import Times, times_of
from moelab.planning.traffic import FP32, CommunicationPlan, Problem, Units, communication, counts_before, units_of
from moelab.registry import Registry

# A process that trains on a CPU, beside its tensors: measured with Python 3.11 and torch 2.13 (CPU) on Linux, 0.31 GB
# of mapped libraries and 0.13 GB of objects that malloc holds (modules, corpus, oneDNN's primitives).
CPU_PROCESS = 440_000_000
# And where experts compute in bf16: the same in every run that was measured, of 32 to 127 million parameters, on one
# process and on two. Probably what oneDNN keeps of products whose shapes are ever new.
CPU_BF16_EXPERTS = 180_000_000


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Autograd frees activations while it makes gradients, so that a perfect allocator would need room for the larger of
    the two; so does CUDA's, which keeps sizes apart (not measured). malloc does not: what is freed in pieces, between
    what stays, has no hole for the gradient of a whole bank, and the process grows by both. Measured resident sets of
    eight CPU runs of 68 to 280 million parameters (dense and MoE, fp32 and bf16, 512 and 4,096 tokens; docs/compute.md)
    are 0.97 to 1.02 of this sum, and 1.18 to 1.55 of what the larger of the two would predict.

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
    process: int = 0  # of a CPU, what the process holds beside its tensors
    heap: bool = False  # malloc's, which can't give the place of freed activations to gradients

    @property
    def tensors(self) -> int:
        """The most bytes of tensors alive at once: activations shrink while gradients grow."""
        held = self.parameters + self.optimizer + self.weights_in_use + self.working
        return held + max(self.activations, self.gradients)

    @property
    def unused(self) -> int:
        """What was freed between what stays, so that nothing of its size fits there: activations, gathered layers."""
        return min(self.activations, self.gradients) + self.passing if self.heap else 0

    @property
    def peak(self) -> int:
        """Memory that the device must have: on a CPU the resident set of the process."""
        return self.tensors + self.unused + self.process


@dataclass(frozen=True)
class Plan:
    """What `moelab plan` prints."""

    problem: Problem
    memory: MemoryPlan
    communication: CommunicationPlan
    total_parameters: int
    trained: int  # numbers that the optimizer steps
    times: Times | None  # of a step, on a machine that is known


def predict(
    config: ModelConfig, problem: Problem, registry: Registry | None = None, machine: Machine | None = None
) -> Plan:
    """The plan of `config` on `problem`, and how long a step takes on `machine`.

    Raises ConfigError for a mesh that can't be, and where the parts can't be counted without data.
    """
    problem.parallel.check()
    registry = registry or Registry()
    losses = build_balance_losses(config, registry)
    with FakeTensorMode():
        model = build_model(config, registry, seed=None)
        _check_dealt(model, problem)
        sent = communication(model, problem, losses)  # before other backends stand there, to be counted
        if problem.kept == torch.bfloat16:
            narrow(model)
        targets = adapter_targets(model, problem.adapters)
        if targets:
            train_alone(model, targets)
        saved, state = _saved(model, problem), _state(model, problem, registry)
    times = times_of(model, problem, sent, machine, counts_before(problem, losses)) if machine else None
    total = sum(parameter.numel() for parameter in model.parameters())
    memory, trained = replace(_memory(model, problem, saved), optimizer=state), total
    if targets:
        memory, trained = _adapted(memory, problem, targets), sum(target.numbers for target in targets)
    return Plan(problem, memory, sent, total, trained, times)


def _check_dealt(model: Transformer, problem: Problem) -> None:
    for block in moe_blocks(model):
        if block.layout.num_experts % problem.parallel.expert:
            raise ConfigError(
                f"parallel.expert: {problem.parallel.expert} does not divide the {block.layout.num_experts} experts of "
                f"layer {block.layer_id}; take a number that divides those of all layers"
            )


def _memory(model: Transformer, problem: Problem, saved: _Saved) -> MemoryPlan:
    units, mesh, layers = units_of(model, problem.parallel), problem.parallel, len(model.layers)
    held = (units.root + sum(units.layers)) // mesh.shard + sum(units.banks) // problem.copies
    again = [problem.recomputes(index) for index in range(layers)]
    per_layer = saved.activations // layers
    # A layer that is computed again keeps its input; what lies between the layers counts as theirs.
    kept = sum(problem.tokens * model.config.hidden_size * FP32 if twice else per_layer for twice in again)
    adds_up = problem.micro_batches > 1 and problem.keeps_whole_gradients
    # Of one device, which alone keeps anything narrower than fp32.
    spared = sum((FP32 - parameter.element_size()) * parameter.numel() for parameter in model.parameters())
    return MemoryPlan(
        parameters=FP32 * held - spared,
        gradients=FP32 * (units.whole if adds_up else held) - spared,
        optimizer=0,
        weights_in_use=(saved.casts if not all(again) else saved.cached) + _whole(units, problem),
        activations=kept if any(again) else saved.activations,
        # Gradients of one layer's activations, about half of which live at once; and the layer itself if recomputed.
        working=per_layer // 2 + (per_layer if any(again) else 0) + _whole_gradients(units, problem),
        passing=_passing(units, problem),
        process=_process(model, problem),
        heap=problem.device == "cpu",
    )


def _state(model: Transformer, problem: Problem, registry: Registry) -> int:
    """Bytes that the optimizer holds on one device, as it says itself.

    Numbers of the banks and of the rest are shared out over different devices. Raises ConfigError as it is built.
    """
    settings = OptimizerConfig(dict(problem.algorithm), moments_dtype=str(problem.moments).removeprefix("torch."))
    context = OptimizerContext(trained_parameters(model, {}), settings, problem.parallel.world, bool(problem.adapters))
    optimizer = registry.build(OPTIMIZERS, settings.algorithm, context, OPTIMIZERS.key)
    routed = {id(parameter) for block in moe_blocks(model) for parameter in block.experts.parameters()}
    units, found = units_of(model, problem.parallel), {True: [0, 0], False: [0, 0]}
    for group, _, parameter in each(optimizer):
        sums = found[id(parameter) in routed]
        sums[0] += parameter.numel()
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
    )


def _process(model: Transformer, problem: Problem) -> int:
    if problem.device != "cpu":
        return 0
    experts = problem.dtype != torch.float32 and any(True for _ in moe_blocks(model))
    return CPU_PROCESS + (CPU_BF16_EXPERTS if experts else 0)


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


@dataclass(frozen=True)
class _Saved:
    """Bytes that autograd keeps, parameters themselves left out."""

    activations: int
    casts: int  # of weights to the matmuls' dtype
    cached: int  # of these, what autocast holds until the forward pass ends: not experts', which are cast by hand


class _CountedExperts:
    """Keeps what grouped_mm and megablocks keep, for any routing; with `fused`, what batched keeps.

    `every`: and what every expert gives for every token, where the counted backend computes that.
    """

    name = "counted"

    def __init__(self, fused: bool, dealt: bool, every: bool) -> None:
        self._fused, self._dealt, self._every = fused, dealt, every

    def supports(self, problem: ExpertProblem) -> str | None:
        return None

    def __call__(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        """x [T, D] -> [T, D], without a number in it."""
        y = self._chosen(x.to(compute_dtype(x)), routing, bank)
        if self._every and routing.weight.requires_grad:
            y = _KeepEvery.apply(y, bank.num_experts)
        return add_down_bias(y, routing, bank).to(x.dtype)

    def _chosen(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        plan = dispatch_plan(routing)
        gate_up, down = bank.gate_up.to(x.dtype), bank.down.to(x.dtype)
        if self._fused and not self._dealt:
            y: Tensor = _KeepFused.apply(x, routing.weight, gate_up, down)
            return y
        rows = gather_rows(x, plan)
        if self._fused:  # of rows that came from other processes, as many as went to them
            out: Tensor = _KeepFused.apply(rows, routing.weight, gate_up, down)
        else:
            expert = routing.expert.index_select(0, plan.order)
            with torch.autocast("cpu", enabled=False):
                out = bank.activate(add_up_bias(rows @ gate_up[0].t(), expert, bank)) @ down[0]
        return combine_rows(out, routing.weight, plan)


class _Placeholders(nn.Module):
    """Keeps an assignment that is not served as a row: how many there are would depend on the data."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> the router's own routing, all of whose assignments count."""
        return replace(self.router(x, info), served=None)


class _KeepFused(torch.autograd.Function):
    """x, the routing weights, the banks and the gate_up rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, gate_up, down, x.new_empty(weight.numel(), gate_up.shape[1]))
        return torch.empty_like(x)


class _KeepEvery(torch.autograd.Function):
    """[E, T, D] for the gradient of the weights that no token gave."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, experts: int) -> Tensor:
        ctx.save_for_backward(y.new_empty(experts, *y.shape))
        return y.view_as(y)


def _saved(model: Transformer, problem: Problem) -> _Saved:
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[torch.UntypedStorage, int | None]] = {}  # held, so that no other storage gets its address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and storage._cdata not in kept:
            kept[storage._cdata] = (storage, _cast_from(tensor))
        return tensor

    routers = [block.router for block in moe_blocks(model)]
    for block in moe_blocks(model):
        block.believe()  # the look at the first routing's values needs values
        block.router = _Placeholders(block.router)
        every = getattr(block.backend, "computes_every_expert", False)
        block.backend = _CountedExperts(problem.device == "cpu", problem.parallel.expert > 1, every)
        block.chunk = None
    if problem.device != "cpu":  # the fake tensors are the CPU's
        for attention in (module for module in model.modules() if isinstance(module, Attention)):
            if isinstance(attention.kernel, FullAttention):
                attention.kernel.attend = torch_attention
    ids = torch.zeros(problem.sequences, problem.sequence_length, dtype=torch.int64)
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=problem.dtype != torch.float32),
        ):
            output = model.train()(ids, targets=ids)
            assert output.token_loss is not None
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigError(
            f"model.moe.router: its shapes depend on the data ({error.func}), so nothing can be counted without any; "
            "plan with one that has a fixed number of experts per token, such as softmax_topk"
        ) from error
    finally:
        for block, router in zip(moe_blocks(model), routers, strict=True):
            block.router = router
    experts = {id(parameter) for block in moe_blocks(model) for parameter in block.experts.parameters()}
    activations = sum(storage.nbytes() for storage, source in kept.values() if source is None)
    cached = sum(storage.nbytes() for storage, source in kept.values() if source is not None and source not in experts)
    routed = sum(storage.nbytes() for storage, source in kept.values() if source in experts)
    return _Saved(activations, cached + routed // problem.parallel.expert, cached)


def _cast_from(tensor: Tensor) -> int | None:
    """The identity of the parameter from which alone autograd made it, by casts and views; None: it is no weight."""
    node = tensor.grad_fn
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
        parameter = getattr(node, "variable", None)  # AccumulateGrad has one
        if parameter is not None:
            return id(parameter)
    return None
