"""What autograd keeps of a forward pass, counted on tensors that have shapes and no data.

The model runs with its own routers, losses and attention; only what hangs on the routing's numbers, the experts' rows,
is kept as the backends keep it for any routing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from moelab.errors import ConfigError
from moelab.moe.balance import NamedLoss
from moelab.moe.batch_statistics import BatchStatistics
from moelab.moe.contracts import ExpertProblem
from moelab.moe.dispatch import combine_rows, dispatch_plan, gather_rows
from moelab.moe.experts import ExpertBank, add_down_bias, add_up_bias, compute_dtype
from moelab.moe.routing import LayerRecord, Routing, TokenInfo
from moelab.nn.attention import Attention
from moelab.nn.count import moe_blocks
from moelab.nn.full_attention import FullAttention, torch_attention
from moelab.nn.latent_attention import LatentAttention
from moelab.nn.transformer import TokenContext, Transformer
from moelab.planning.traffic import Problem
from moelab.plugin_faults import guilty

OUTSIDE, LOGITS = -1, -2  # places where something is kept, beside the layers' numbers


@dataclass(frozen=True)
class Saved:
    """Bytes that autograd keeps, parameters themselves left out."""

    layers: tuple[int, ...]  # of each
    outside: int  # between and after them, but for
    logits: int  # if the loss keeps them
    casts: int  # of weights to the matmuls' dtype
    cached: int  # of these, what autocast holds until the forward pass ends: not experts', which are cast by hand


class _CountedExperts:
    """Keeps what grouped_mm and megablocks keep, for any routing; with `fused`, what batched keeps.

    `every`: and what every expert gives for every token, where the counted backend computes that.
    """

    name = "counted"

    def __init__(self, fused: bool, dealt: bool, every: bool) -> None:
        self.fused, self._dealt, self._every = fused, dealt, every

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
        if self.fused and not self._dealt:
            y: Tensor = _KeepFused.apply(x, routing.weight, gate_up, down)
            return y
        rows = gather_rows(x, plan)
        if self.fused:  # of rows that came from other processes, as many as went to them
            out: Tensor = _KeepFused.apply(rows, routing.weight, gate_up, down)
        else:
            expert = routing.expert.index_select(0, plan.order)
            with torch.autocast("cpu", enabled=False):
                out = bank.activate(add_up_bias(rows @ gate_up[0].t(), expert, bank)) @ down[0]
        return combine_rows(out, routing.weight, plan)


def _all_served(layer_id: int, routing: Routing, x: Tensor, info: TokenInfo) -> Routing:
    """An assignment that is not served is kept as a row: how many there are would depend on the data."""
    return replace(routing, served=None)


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


def count_saved(model: Transformer, problem: Problem, losses: Sequence[NamedLoss] = ()) -> Saved:
    """Of a micro-batch of `problem` with its balance losses, by `model` on tensors without data.

    Its backends and chunks are gone then.
    """
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, _Kept] = {}
    where = _Where(model)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and storage._cdata not in kept:
            logits = tuple(tensor.shape) == (problem.tokens, model.config.vocab_size)
            place = LOGITS if logits and where.layer == OUTSIDE else where.layer
            kept[storage._cdata] = _Kept(storage, _cast_from(tensor), place)
        return tensor

    for block in moe_blocks(model):
        block.believe()  # the look at the first routing's values needs values
        every = block.computes_every_expert
        fused = problem.device == "cpu" and getattr(block.backend, "keeps_gate_up_alone", False)
        block.backend = _CountedExperts(fused, problem.parallel.expert > 1, every)
        block.chunk = None
    if problem.device != "cpu":  # the fake tensors are the CPU's
        for attention in (m for m in model.modules() if isinstance(m, Attention | LatentAttention)):
            if isinstance(attention.kernel, FullAttention):
                attention.kernel.attend = torch_attention
    model.recompute_logits = False
    ids = torch.zeros(problem.sequences, problem.sequence_length, dtype=torch.int64)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=problem.dtype != torch.float32):
                output = model.train()(ids, targets=ids, tokens=TokenContext(routing_override=_all_served))
            assert output.token_loss is not None
            list(_terms(losses, output.records))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise _needs_values(error) from error
    finally:
        where.leave()
    experts = {id(parameter) for block in moe_blocks(model) for parameter in block.experts.parameters()}
    weights = [one for one in kept.values() if one.weight is not None]
    cached = sum(one.storage.nbytes() for one in weights if one.weight not in experts)
    routed = sum(one.storage.nbytes() for one in weights if one.weight in experts)
    at = Counter[int]()
    for one in kept.values():
        at[one.place] += one.storage.nbytes() if one.weight is None else 0
    layers = tuple(at[index] for index in range(len(model.layers)))
    return Saved(layers, at[OUTSIDE], at[LOGITS], cached + routed // problem.parallel.expert, cached)


def _needs_values(error: DataDependentOutputException | DynamicOutputShapeException) -> ConfigError:
    """Naming the part whose code asked for a number of a tensor that has none."""
    said = ConfigError(
        f"asks for the values of a tensor, or for a shape that hangs on them ({error.func}), and a plan has none, so "
        "nothing can be counted; plan, or set train.memory_budget, with a part that doesn't, such as softmax_topk"
    ).with_traceback(error.__traceback__)
    part = guilty(error)
    return ConfigError(f"model: {said}") if part is None else part.raised(said)


def _terms(losses: Sequence[NamedLoss], records: Sequence[LayerRecord]) -> Iterator[Tensor]:
    """Of each balance loss, but for one that asks for a number of its tensors: it is not counted."""
    statistics = BatchStatistics(losses)
    statistics.add(records)
    for named in losses:
        with suppress(DataDependentOutputException, DynamicOutputShapeException):
            yield named(records, statistics.context(named))


@dataclass(frozen=True)
class _Kept:
    storage: torch.UntypedStorage  # held, so that no other gets its address
    weight: int | None  # of which parameter it is a cast; None: it is no weight
    place: int  # the number of a layer, OUTSIDE or LOGITS


class _Where:
    """Which layer is being computed."""

    def __init__(self, model: Transformer) -> None:
        self.layer = OUTSIDE
        self._hooks = [
            hook
            for index, layer in enumerate(model.layers)
            for hook in (
                layer.register_forward_pre_hook(partial(self._at, index)),
                layer.register_forward_hook(partial(self._at, OUTSIDE)),
            )
        ]

    def _at(self, layer: int, *_: object) -> None:
        self.layer = layer

    def leave(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()


def _cast_from(tensor: Tensor) -> int | None:
    """The identity of the parameter from which alone autograd made it, by casts and views; None: it is no weight."""
    node = tensor.grad_fn
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
        parameter = getattr(node, "variable", None)  # AccumulateGrad has one
        if parameter is not None:
            return id(parameter)
    return None
