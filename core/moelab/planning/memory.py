"""Memory of a training step, predicted from the config alone; nothing is allocated.

The model runs once on fake tensors, which have shapes but no data, while everything that autograd saves is
counted. So a plugin's router, loss or attention is counted as it is, not by a formula of someone else's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from moelab.builder import build_model
from moelab.config.model import ModelConfig
from moelab.errors import ConfigError
from moelab.moe.block import MoEBlock
from moelab.moe.contracts import ExpertProblem, Router
from moelab.moe.dispatch import combine_rows, dispatch_plan, gather_rows
from moelab.moe.experts import ExpertBank, compute_dtype, swiglu
from moelab.moe.routing import Routing, TokenInfo
from moelab.nn.attention import Attention, torch_attention
from moelab.nn.count import moe_blocks
from moelab.nn.transformer import Transformer
from moelab.planning.traffic import CommunicationPlan, Problem, communication, model_sizes
from moelab.registry import Registry

FP32 = 4
ADAMW = 2  # moments, in the parameters' dtype
# A process that trains on a CPU, beside its tensors: measured with Python 3.11 and torch 2.13 (CPU) on Linux, 0.31 GB
# of mapped libraries and 0.13 GB of objects that malloc holds (modules, corpus, oneDNN's primitives).
CPU_PROCESS = 440_000_000


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Autograd frees activations while it makes gradients, so that a perfect allocator would need room for the larger of
    the two; so does CUDA's, which keeps sizes apart (not measured). malloc does not: what is freed in pieces, between
    what stays, has no hole for the gradient of a whole bank, and the process grows by both. Measured resident sets of
    eight CPU runs of 68 to 280 million parameters (dense and MoE, fp32 and bf16, 512 and 4,096 tokens; docs/compute.md)
    are 0.98 to 1.06 of this sum, and 1.18 to 1.55 of what the larger of the two would predict.
    """

    parameters: int
    gradients: int
    optimizer: int
    weights_in_use: int  # copies that matmuls read: cast, or gathered from other devices
    activations: int  # kept from the forward pass for the backward pass
    working: int  # the layer that is being computed
    process: int = 0  # of a CPU, what the process holds beside its tensors
    heap: bool = False  # malloc's, which can't give the place of freed activations to gradients

    @property
    def tensors(self) -> int:
        """The most bytes of tensors alive at once: activations shrink while gradients grow."""
        held = self.parameters + self.optimizer + self.weights_in_use + self.working
        return held + max(self.activations, self.gradients)

    @property
    def unused(self) -> int:
        """Freed activations that lie between what stays, so that no gradient fits into them."""
        return min(self.activations, self.gradients) if self.heap else 0

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


def predict(config: ModelConfig, problem: Problem, registry: Registry | None = None) -> Plan:
    """The plan of `config` on `problem`. Raises ConfigError where the parts can't be counted without data."""
    if problem.devices % problem.expert_parallel:
        raise ConfigError(f"expert_parallel {problem.expert_parallel} does not divide devices {problem.devices}")
    with FakeTensorMode():
        model = build_model(config, registry, seed=None)
        saved = _saved(model, problem)
        sizes = model_sizes(model)
    units = _unit_sizes(model, problem.expert_parallel)
    layers = len(model.layers)
    per_layer = saved.activations // layers
    activations = saved.activations
    if problem.checkpointing:
        activations = layers * problem.tokens * config.hidden_size * FP32
    memory = MemoryPlan(
        parameters=FP32 * sizes.total // problem.devices,
        gradients=FP32 * sizes.total // problem.devices,
        optimizer=ADAMW * FP32 * sizes.total // problem.devices,
        # Sharded: the unit in use and the one fetched ahead; alone: autocast's copies live until the backward pass.
        weights_in_use=saved.casts if problem.devices == 1 else 2 * max(units) * problem.dtype.itemsize,
        activations=activations,
        # Gradients of one layer's activations, about half of which live at once; and the layer itself if recomputed.
        working=per_layer // 2 + (per_layer if problem.checkpointing else 0),
        process=CPU_PROCESS if problem.device == "cpu" else 0,
        heap=problem.device == "cpu",
    )
    return Plan(problem, memory, communication(model, sizes, problem), sizes.total)


@dataclass(frozen=True)
class _Saved:
    """Bytes that autograd keeps, parameters themselves left out."""

    activations: int
    casts: int  # of weights to the matmuls' dtype


class _CountedExperts:
    """Keeps what grouped_mm and megablocks keep, for any routing; with `fused`, what batched keeps."""

    name = "counted"

    def __init__(self, fused: bool) -> None:
        self._fused = fused

    def supports(self, problem: ExpertProblem) -> str | None:
        return None

    def __call__(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        """x [T, D] -> [T, D], without a number in it."""
        dtype = compute_dtype(x)
        plan = dispatch_plan(routing)
        gate_up, down = bank.gate_up.to(dtype), bank.down.to(dtype)
        if self._fused:
            y: Tensor = _KeepFused.apply(x.to(dtype), routing.weight, gate_up, down)
            return y.to(x.dtype)
        rows = gather_rows(x.to(dtype), plan)
        with torch.autocast("cpu", enabled=False):
            out = swiglu(rows @ gate_up[0].t()) @ down[0]
        return combine_rows(out, routing.weight, plan).to(x.dtype)


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


def _saved(model: Transformer, problem: Problem) -> _Saved:
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[torch.UntypedStorage, bool]] = {}  # held, so that no other storage gets its address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and storage._cdata not in kept:
            kept[storage._cdata] = (storage, _is_cast_weight(tensor))
        return tensor

    routers = [block.router for block in moe_blocks(model)]
    for block in moe_blocks(model):
        block.believe()  # the look at the first routing's values needs values
        block.router = _Placeholders(block.router)
        block.backend, block.chunk = _CountedExperts(problem.device == "cpu"), None
    if problem.device != "cpu":  # the fake tensors are the CPU's
        for attention in (module for module in model.modules() if isinstance(module, Attention)):
            attention.attend = torch_attention
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
    sizes = [(storage.nbytes(), is_weight) for storage, is_weight in kept.values()]
    return _Saved(sum(n for n, is_weight in sizes if not is_weight), sum(n for n, is_weight in sizes if is_weight))


def _is_cast_weight(tensor: Tensor) -> bool:
    """Whether autograd made it from one parameter alone, by casts and views."""
    node = tensor.grad_fn
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
        if hasattr(node, "variable"):  # AccumulateGrad: the parameter
            return True
    return False


def _unit_sizes(model: Transformer, expert_parallel: int) -> list[int]:
    """Parameters of what is gathered at once: each layer with this device's experts, the embedding, the head."""
    units = [sum(p.numel() for p in unit.parameters()) for unit in (model.embed_tokens, model.lm_head)]
    for layer in model.layers:
        size = sum(parameter.numel() for parameter in layer.parameters())
        if isinstance(layer.mlp, MoEBlock):
            routed = sum(parameter.numel() for parameter in layer.mlp.experts.parameters())
            size -= routed - routed // expert_parallel
        units.append(size)
    return units
