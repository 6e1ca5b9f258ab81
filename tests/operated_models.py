"""A model in memory before and after a surgery on all its layers, for tests of what the surgery keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import moelab
from moelab.builder import build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.hookspecs import SURGERIES
from moelab.layouts import build_layouts
from moelab.moe.surgery import Evidence, Scores, SurgeryContext, expert_rows_of
from moelab.nn.transformer import Transformer
from moelab.surgery.layout_change import with_layouts
from moelab.surgery.tensors import FIRST, VALUES, LayerSurgery
from moelab.testing.surgeries import Held

REGISTRY = moelab.Registry(entry_points=False)
LAYOUT = {"name": "uniform", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def config_of(router: Mapping[str, Any], layout: Mapping[str, Any] = LAYOUT, layers: int = 2) -> ModelConfig:
    moe = MoEConfig(
        layout=dict(layout), router=dict(router), shared_expert={"name": "gated", "intermediate_size": 8},
        allow_noncausal=True,
    )  # fmt: skip
    return ModelConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, max_position_embeddings=64, moe=moe,
    )  # fmt: skip


@dataclass
class Operated:
    """Two models in float64, and the surgeries between them by layer."""

    before: Transformer
    after: Transformer
    layers: dict[int, LayerSurgery]

    def gradients(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of the same loss, on the same tokens, in evaluation."""
        found = []
        for model in (self.before, self.after):
            model.eval()
            model.zero_grad()
            logits = model(tokens()).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens().roll(-1, 1).flatten()).backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return found[0], found[1]

    def made(self, name: str, values: Tensor, moment: str = FIRST) -> Tensor:
        """What the surgery makes of `values`, which stand for a moment of the tensor `name` of layer 0."""
        return self.layers[0].make(name.removeprefix("layers.0.mlp."), moment, Held(values))


def tokens() -> Tensor:
    return torch.randint(0, 40, (3, 16), generator=torch.Generator().manual_seed(5))


def operate(
    config: ModelConfig,
    node: Mapping[str, Any],
    scores: Mapping[int, Scores] | None = None,
    before: Transformer | None = None,
) -> Operated:
    """Build, or take the model of this config, operate on every layer that has experts, and build what comes of it."""
    if before is None:
        before = build_model(config, REGISTRY, seed=3).double().eval()
        for name, buffer in before.named_buffers():
            if name.endswith("router.bias"):
                buffer.copy_(torch.linspace(-0.2, 0.2, len(buffer)))
    state, layouts = before.state_dict(), build_layouts(config, REGISTRY)
    layers = {}
    for layer, layout in layouts.items():
        prefix = f"layers.{layer}.mlp."
        router = before.get_submodule(prefix + "router")
        rows = expert_rows_of(router, list(router.state_dict()))
        assert not isinstance(rows, str), rows
        context = SurgeryContext(layer, config.num_hidden_layers, config.hidden_size, layout, rows)
        surgery = REGISTRY.build(SURGERIES, node, context, "surgery")
        evidence = Evidence(lambda name, prefix=prefix: state[prefix + name], (scores or {}).get(layer))  # type: ignore[misc]
        plan = surgery.plan(evidence)
        layers[layer] = LayerSurgery(layer, plan, rows, layout.num_experts, layout.moe_intermediate_size)
    changed = with_layouts(config, {layer: one.plan.layout for layer, one in layers.items()}, REGISTRY)
    after = build_model(changed, REGISTRY, seed=9).double().eval()
    after.load_state_dict({name: _made(name, tensor, layers) for name, tensor in state.items()})
    return Operated(before, after, layers)


def _made(name: str, tensor: Tensor, layers: Mapping[int, LayerSurgery]) -> Tensor:
    parts = name.split(".", 3)
    if parts[0] != "layers" or parts[2] != "mlp" or not layers[int(parts[1])].touches(parts[3]):
        return tensor
    return layers[int(parts[1])].make(parts[3], VALUES, Held(tensor))
