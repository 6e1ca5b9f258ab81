"""A checkpoint that is to be operated on: its config, its plugins, and its tensors, of which none is read yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from functools import partial as bound
from pathlib import Path
from typing import Any

from torch import Tensor

from moelab.builder import build_model
from moelab.checkpoint import MODEL, TRAINING, OwnWeights, is_moelab, read_run_config, read_state, stored_tensors
from moelab.config.run import RunConfig
from moelab.errors import CheckpointError, ConfigError
from moelab.hookspecs import SURGERIES
from moelab.integrity import verified
from moelab.layouts import build_layouts
from moelab.moe.block import MoEBlock
from moelab.moe.layout import ExpertLayout
from moelab.moe.per_layer import match_layers
from moelab.moe.surgery import (
    Evidence,
    ExpertRows,
    LayerPlan,
    Scores,
    Surgery,
    SurgeryContext,
    expert_rows_of,
    plan_fault,
)
from moelab.nn.transformer import Transformer
from moelab.registry import Registry
from moelab.surgery.tensors import LayerSurgery
from moelab.tensor_parts import Stored
from moelab.trust import stored_registry

Node = Mapping[str, Any]  # {name: ..., options} of a surgery


@dataclass(frozen=True)
class Patient:
    """A moelab checkpoint as `verified` gave it."""

    folder: Path
    config: RunConfig
    registry: Registry
    model: Transformer  # on the meta device
    tensors: Mapping[str, Stored]
    training: Mapping[str, Stored]

    @cached_property
    def layouts(self) -> dict[int, ExpertLayout]:
        return build_layouts(self.config.model, self.registry)

    @cached_property
    def state(self) -> dict[str, Any]:
        """What state.json says."""
        return read_state(self.folder)

    @property
    def blocks(self) -> dict[int, MoEBlock]:
        return {layer: block for layer in self.layouts if isinstance(block := self.model.layers[layer].mlp, MoEBlock)}

    def layers(self, pattern: str | None) -> list[int]:
        """The layers that a pattern names; None: all that have experts. Raises ConfigError for a dense one."""
        if pattern is None:
            return sorted(self.layouts)
        chosen = match_layers(pattern, self.config.model.num_hidden_layers, "layers")
        dense = [layer for layer in chosen if layer not in self.layouts]
        if dense:
            raise ConfigError(f"layers: layer {dense[0]} is dense; {sorted(self.layouts)} have experts")
        return sorted(chosen)

    def context(self, layer_id: int, seed: int) -> SurgeryContext:
        """What a surgery on this layer is built from. Raises ConfigError where the layer can't be operated on."""
        block, layout = self.blocks[layer_id], self.layouts[layer_id]
        if layout.expert_widths is not None:
            raise ConfigError(f"layer {layer_id}: its experts differ in width, and surgery knows experts of one width")
        model = self.config.model
        return SurgeryContext(layer_id, model.num_hidden_layers, model.hidden_size, layout, _rows(block), seed)

    def read(self, layer_id: int, name: str) -> Tensor:
        """ "experts.down", "router.weight" of a layer, the whole of it as it is stored."""
        return self.tensors[f"layers.{layer_id}.mlp.{name}"].read()


def run_to_operate_on(path: Path, *, verify: bool = True) -> Path:
    """A run folder's newest checkpoint, or a checkpoint, as it was written. CheckpointError for other folders."""
    folder = verified(path, verify=verify)
    if not is_moelab(folder):
        raise CheckpointError(
            f"{folder}: is a Hugging Face folder, which has no run to go on with; surgery takes a run folder or one of "
            "its checkpoints (a run of one step, train.init_from, makes one)"
        )
    return folder


def open_patient(folder: Path, *, registry: Registry | None = None, trust: bool = False) -> Patient:
    """What `run_to_operate_on` gave; headers are read, no weights. Raises ConfigError for a dense model."""
    config = read_run_config(folder)
    if config.model.moe is None:
        raise ConfigError(f"{folder}: its model is dense; `moelab upcycle` makes experts of a dense model")
    plugins = stored_registry(config, folder, registry=registry, trust=trust)
    model = build_model(config.model, plugins, device="meta", seed=None)
    OwnWeights(folder).check(model)
    return Patient(folder, config, plugins, model, stored_tensors(folder, MODEL), stored_tensors(folder, TRAINING))


def surgeries_of(patient: Patient, node: Node, layers: list[int], seed: int) -> dict[int, Surgery]:
    """{layer: the surgery that `node` names, built for it}. Raises ConfigError for what can't be done there."""
    return {
        layer: patient.registry.build(SURGERIES, node, patient.context(layer, seed), SURGERIES.key) for layer in layers
    }


def plan_all(
    patient: Patient, node: Node, surgeries: Mapping[int, Surgery], scores: Mapping[int, Scores], seed: int
) -> dict[int, LayerSurgery]:
    """{layer: its plan with what carrying it out needs}. ConfigError naming the plugin of a plan that can't be."""
    found = {}
    for layer, surgery in surgeries.items():
        context = patient.context(layer, seed)
        plan: LayerPlan = surgery.plan(Evidence(cache(bound(patient.read, layer)), scores.get(layer)))
        fault = plan_fault(plan, context)
        if fault is not None:
            raise patient.registry.part(SURGERIES, node, SURGERIES.key, layer).fault(fault, surgery.plan)
        layout = context.layout
        found[layer] = LayerSurgery(layer, plan, context.rows, layout.num_experts, layout.moe_intermediate_size, seed)
    return found


def _rows(block: MoEBlock) -> ExpertRows:
    assert isinstance(block.router, object)
    names = list(getattr(block.router, "state_dict", dict)())
    rows = expert_rows_of(block.router, names)
    if isinstance(rows, str):
        part = block.parts["router"]
        raise ConfigError(f"layer {block.layer_id}: router '{part.name}' can't be cut by experts: {rows}")
    return rows
