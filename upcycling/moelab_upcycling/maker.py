"""Makes any tensor of a plan from the sources' weights; the conversion and its verification both call this."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab import initialiser_promises as promises
from moelab.hf import roles as names
from moelab.hookspecs import (
    EXPERT_INITIALISERS,
    OUTPUT_SCALINGS,
    ROUTER_INITIALISERS,
    SHARED_INITIALISERS,
    BuiltT,
    ExtensionPoint,
)
from moelab.initialisers import (
    ExpertInitialiser,
    NeuronPlan,
    OutputScaling,
    RouterInitialiser,
    SharedInitialiser,
    UpcycleContext,
    redrawn_of,
)
from moelab.plugin_faults import PluginPart
from moelab.registry import Registry
from moelab_upcycling.assembly import Scratch, assembled, made_rows
from moelab_upcycling.dense import LoadedMatrix
from moelab_upcycling.dtypes import STORAGE, convert, from_float32, scaled, to_float32
from moelab_upcycling.plan import OutputTensor, Plan
from moelab_upcycling.prompts import prompt_reader
from moelab_upcycling.source import DenseSource

_MEAN = -1  # as a checkpoint: the mean of all of them


@dataclass(frozen=True)
class LayerParts:
    """The four initialisers of one layer."""

    experts: ExpertInitialiser
    shared: SharedInitialiser
    router: RouterInitialiser
    scaling: OutputScaling
    named: Mapping[str, PluginPart]  # how messages call them

    def plugin_parts(self) -> list[tuple[PluginPart, object]]:
        """Who to blame for what they raise."""
        return [(part, getattr(self, axis)) for axis, part in self.named.items()]

    def refuse(self, axis: str, method: str, fault: str | None) -> None:
        """Raise ConfigError where a method of an initialiser broke its promise."""
        if fault is not None:
            raise self.named[axis].fault(fault, getattr(getattr(self, axis), method))


def layer_context(plan: Plan, layer_id: int, routed_share: float = 0.0) -> UpcycleContext:
    """What the initialisers of one layer are told."""
    target = plan.target
    return UpcycleContext(
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        layer_id=layer_id,
        num_hidden_layers=target.num_hidden_layers,
        layout=target.layouts[layer_id],
        shared_intermediate_size=target.shared_intermediate_size,
        norm_topk_prob=target.norm_topk_prob,
        initializer_range=target.initializer_range,
        seed=plan.seed,
        num_sources=len(plan.sources),
        routed_share=routed_share,
    )


def build_parts(plan: Plan, registry: Registry, layer_id: int) -> LayerParts:
    """ConfigError where the recipe does not fit the layout."""
    named: dict[str, PluginPart] = {}

    def build(point: ExtensionPoint[UpcycleContext, BuiltT], context: UpcycleContext) -> BuiltT:
        axis = point.key.rpartition(".")[2]
        node = getattr(plan.recipe, axis)
        part = registry.build(point, node, context, point.key)
        named[axis] = registry.part(point, node, point.key, layer_id)
        fault = promises.built(axis, part)
        if fault is not None:
            raise named[axis].fault(fault, part)
        return part

    scaling = build(OUTPUT_SCALINGS, layer_context(plan, layer_id))
    context = layer_context(plan, layer_id, scaling.share)
    return LayerParts(
        build(EXPERT_INITIALISERS, context),
        build(SHARED_INITIALISERS, context),
        build(ROUTER_INITIALISERS, context),
        scaling,
        named,
    )


class Maker:
    """Holds at most one FFN matrix of each source, and the plans of one layer, so ask for tensors in plan order."""

    def __init__(self, plan: Plan, registry: Registry, sources: list[DenseSource]) -> None:
        self.plan = plan
        self.registry = registry
        self.sources = sources
        self.prompts = prompt_reader(sources[0])  # one for all layers: their hidden states follow from each other
        self._layer: _Layer | None = None
        self._scratch = Scratch()

    def make(self, tensor: OutputTensor) -> Iterator[npt.NDArray[Any]]:
        """The tensor's values as contiguous arrays in file order; an array may be overwritten by the next."""
        if tensor.role == "copy":
            yield from self._copied(tensor)
            return
        if tensor.role == "zeros":
            yield np.zeros(tensor.shape, STORAGE[tensor.dtype])
            return
        if self._layer is None or self._layer.layer_id != tensor.layer_id:
            self._layer = None  # frees the old matrices before the next are read
            self._layer = _Layer(self, tensor.layer_id)
        yield from self._layer.make(tensor, self._scratch)

    def _copied(self, tensor: OutputTensor) -> Iterator[npt.NDArray[Any]]:
        rows = tensor.shape[0]
        if len(self.sources) == 1 or self.plan.recipe.others == "first":
            dtype = self.sources[0].tensors[tensor.source].dtype
            for piece in self.sources[0].pieces(tensor.source, rows):
                yield convert(piece, dtype, tensor.dtype)
            return
        streams = [source.pieces(tensor.source, rows) for source in self.sources]
        dtypes = [source.tensors[tensor.source].dtype for source in self.sources]
        for pieces in zip(*streams, strict=True):
            yield mean_of(list(pieces), dtypes, tensor.dtype)


def mean_of(arrays: list[npt.NDArray[Any]], dtypes: list[str], dtype: str) -> npt.NDArray[Any]:
    """Averaged in float32 and rounded once."""
    total = to_float32(arrays[0], dtypes[0]).copy()
    for array, kind in zip(arrays[1:], dtypes[1:], strict=True):
        total += to_float32(array, kind)
    return from_float32(total / np.float32(len(arrays)), dtype)


def logit_std(source: DenseSource, layer_id: int, router_std: float) -> float:
    """Of the router's logits: a normed input has entries of variance norm_weight^2."""
    name = names.router_norm(layer_id)
    weight = to_float32(source.array(name), source.tensors[name].dtype).astype(np.float64)
    return router_std * float(np.sqrt((weight * weight).sum()))


class _Layer:
    """One MoE layer while it is being made."""

    def __init__(self, maker: Maker, layer_id: int) -> None:
        self.plan, self.sources, self.layer_id = maker.plan, maker.sources, layer_id
        self.parts = build_parts(maker.plan, maker.registry, layer_id)
        self._looked_at: set[tuple[str, str]] = set()  # (axis, matrix): what has been made once
        self._plans: dict[int, NeuronPlan] = {}  # no functools.cache: a layer that holds itself keeps its matrices
        self._held: dict[int, tuple[str, LoadedMatrix]] = {}  # checkpoint -> its one matrix in memory
        for part in (self.parts.experts, self.parts.shared):
            prepare = getattr(part, "prepare", None)
            if prepare is not None:
                prepare(lambda matrix: self.dense(0, matrix))
        if hasattr(self.parts.router, "prepare"):
            self.parts.router.prepare(maker.prompts)

    def make(self, tensor: OutputTensor, scratch: Scratch) -> Iterator[npt.NDArray[Any]]:
        """The tensor in pieces, in file order."""
        if tensor.role in ("router", "shared_gate"):
            axis, method = ("router", "weight") if tensor.role == "router" else ("shared", "gate")
            values = getattr(getattr(self.parts, axis), method)()
            self.parts.refuse(axis, method, promises.made(values, tensor.shape, finite=True))
            yield from_float32(np.ascontiguousarray(values, dtype=np.float32), tensor.dtype)
            return
        for piece in self._rows(tensor, scratch):
            exact = piece if piece.dtype == STORAGE[tensor.dtype] else from_float32(_fp32(piece), tensor.dtype)
            yield scaled(exact, tensor.dtype, self._factor(tensor))

    def _rows(self, tensor: OutputTensor, scratch: Scratch) -> Iterator[npt.NDArray[Any]]:
        """What the initialiser made of it, in file order and not yet scaled."""
        matrix, turned = tensor.matrix, tensor.matrix == "down"
        expert: tuple[int, ...] = ()
        if tensor.role == "shared":
            checkpoint = _MEAN if len(self.sources) > 1 and self.plan.recipe.others == "mean" else 0
            axis, neurons = "shared", self.plan_of_shared
        else:
            axis, neurons, expert = "experts", self.plan_of(tensor.expert), (tensor.expert,)
            checkpoint = neurons.checkpoint
        part, dense = getattr(self.parts, axis), self.dense(checkpoint, matrix)
        storage, width = dense.values.dtype, dense.values.shape[1]
        first = (axis, matrix) not in self._looked_at and not self.parts.named[axis].ours
        self._looked_at.add((axis, matrix))
        redrawn = redrawn_of(part)
        new = None if redrawn is None else redrawn(neurons, *expert, matrix, dense)
        if new is not None:
            count = int(neurons.changed(matrix).sum())
            self.parts.refuse(axis, "redrawn", promises.made(new, (count, width), storage, finite=first))
            new = new if new.dtype == storage else from_float32(_fp32(new), dense.dtype)
            yield from assembled(neurons, matrix, dense.values, new, turned=turned, scratch=scratch)
            return
        rows = part.materialise(neurons, *expert, matrix, dense)
        wanted = (len(neurons.source), width)
        self.parts.refuse(axis, "materialise", promises.made(rows, wanted, storage, finite=first))
        yield from made_rows(rows, turned=turned, scratch=scratch)

    def _factor(self, tensor: OutputTensor) -> float:
        if tensor.role == "shared":
            return float(self.parts.shared.gain) if tensor.matrix == "down" else 1.0
        return float(self.factors.get(tensor.matrix, 1.0))

    @cached_property
    def plan_of_shared(self) -> NeuronPlan:
        plan = self.parts.shared.plan()
        target, sources = self.plan.target, len(self.sources)
        width = target.shared_intermediate_size
        self.parts.refuse("shared", "plan", promises.planned(plan, width, target.intermediate_size, sources))
        return plan

    def plan_of(self, expert: int) -> NeuronPlan:
        """Of one routed expert."""
        plan = self._plans.get(expert)
        if plan is None:
            plan = self.parts.experts.plan(expert)
            target, sources = self.plan.target, len(self.sources)
            width = target.layouts[self.layer_id].moe_intermediate_size
            self.parts.refuse("experts", "plan", promises.planned(plan, width, target.intermediate_size, sources))
            self._plans[expert] = plan
        return plan

    def plugin_parts(self) -> list[tuple[PluginPart, object]]:
        """Who to blame for what the initialisers raise."""
        return self.parts.plugin_parts()

    @cached_property
    def factors(self) -> dict[str, float]:
        """On the routed experts' matrices; `silence` multiplies down."""
        context = layer_context(self.plan, self.layer_id, self.parts.scaling.share)
        sharpness = logit_std(self.sources[0], self.layer_id, self.parts.router.std)
        found = self.parts.scaling.factors(context, sharpness)
        self.parts.refuse("scaling", "factors", promises.factors(found))
        factors = dict(found)
        if self.plan.recipe.silence is not None:
            factors["down"] = factors.get("down", 1.0) * self.plan.recipe.silence
        return factors

    def dense(self, checkpoint: int, matrix: str) -> LoadedMatrix:
        """One FFN matrix of a source, or of the mean of all."""
        self._held = {key: value for key, value in self._held.items() if value[0] == matrix}  # before the next is read
        if checkpoint in self._held:
            return self._held[checkpoint][1]
        name = names.dense_ffn(self.layer_id, matrix)
        if checkpoint == _MEAN:
            parts = [self._load(source, name, matrix) for source in self.sources]
            values = mean_of(parts, [self.plan.dtype] * len(parts), self.plan.dtype)
        else:
            values = self._load(self.sources[checkpoint], name, matrix)
        loaded = LoadedMatrix(values, self.plan.dtype)
        self._held[checkpoint] = (matrix, loaded)
        return loaded

    def _load(self, source: DenseSource, name: str, matrix: str) -> npt.NDArray[Any]:
        values = source.transposed(name) if matrix == "down" else source.array(name)
        return convert(values, source.tensors[name].dtype, self.plan.dtype)


def _fp32(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return values.astype(np.float32, copy=False)
