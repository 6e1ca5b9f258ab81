"""The one place where names become objects: config and registry -> a model and its balance losses."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from moelab.config.model import ModelConfig
from moelab.config.rope_scaling import RopeContext, as_part
from moelab.errors import ConfigError
from moelab.hookspecs import (
    ACTIVATIONS,
    ATTENTIONS,
    BALANCE_LOSSES,
    EXPERT_BACKENDS,
    EXPERT_LAYOUTS,
    ROPE_SCALINGS,
    ROUTERS,
    SHARED_EXPERTS,
    ExtensionPoint,
)
from moelab.layouts import build_layout, build_layouts
from moelab.moe import promises
from moelab.moe.activation import Activation, ActivationContext, SwiGLU
from moelab.moe.balance import COMMON_KEYS, NamedLoss, split_common
from moelab.moe.block import MoEBlock
from moelab.moe.contracts import BackendContext, BalanceLossContext, ExpertBackend, MoEContext
from moelab.moe.experts import ExpertBank
from moelab.moe.layout import ExpertLayout
from moelab.moe.per_layer import LayerParts, layer_parts, match_layers
from moelab.nn.attention import attention_context
from moelab.nn.attention_inputs import AttentionKernel, TurnedKernel
from moelab.nn.init import initialise, release
from moelab.nn.latent import LatentProjection
from moelab.nn.mlp import MLP
from moelab.nn.positional_promises import attention_built, scaled, scaling_built
from moelab.nn.rope import Rope, RopeScaling
from moelab.nn.transformer import Transformer
from moelab.plugin_faults import PluginPart, plugins_told
from moelab.registry import Registry
from moelab.seeds import derive_seed


def build_model(
    config: ModelConfig,
    registry: Registry | None = None,
    *,
    device: torch.device | str = "cpu",
    seed: int | None = 0,
    stored: Collection[str] = (),
) -> Transformer:
    """A model with fp32 parameters on `device`, initialised by `seed`; None leaves its weights to be loaded.

    `stored`: parameters that are loaded all the same, for which nothing is drawn.
    Raises ConfigError naming the key, the plugin and its owner for whatever can't be built.
    """
    config.check()
    registry = registry or Registry()
    device = torch.device(device)
    with _seeded(derive_seed(seed or 0, "build")), device:
        model = Transformer(config, list(_mlps(config, registry)), *positional_parts(config, registry))
    if seed is not None and device.type != "meta":
        with plugins_told():  # a router may fill its own parameters
            initialise(model, config.initializer_range, seed, stored)
    return model


build = build_model


def build_hollow(config: ModelConfig, registry: Registry, *, device: torch.device, seed: int) -> Transformer:
    """`build_model`'s, of which the meta device holds what the rule of initialisation decides (`nn.init.draw`).

    So each process of many cuts it and fills in what it keeps. Built layer by layer, for the sake of what plugins'
    constructors decide; what they draw is what `build_model` has them draw.
    """
    config.check()
    with _seeded(derive_seed(seed, "build")):
        mlps = []
        with device:
            for mlp in _mlps(config, registry):
                release(mlp)
                mlps.append(mlp)
        with torch.device("meta"):
            model = Transformer(config, mlps, *positional_parts(config, registry))
    with plugins_told():
        initialise(model, config.initializer_range, seed)
    return model


def build_balance_losses(config: ModelConfig, registry: Registry) -> list[NamedLoss]:
    """The losses of `model.moe.balance_losses`, in order; one that stands twice is logged as name_2."""
    if config.moe is None:
        return []
    layouts = build_layouts(config, registry)
    losses: list[NamedLoss] = []
    for index, node in enumerate(config.moe.balance_losses):
        where = f"model.moe.balance_losses.{index}"
        own, pattern, schedule = split_common(node, where)
        layers = frozenset(layouts)
        if pattern is not None:
            layers &= frozenset(match_layers(pattern, config.num_hidden_layers, f"{where}.layers"))
        if not layers:
            raise ConfigError(f"{where}.layers: none of these layers has experts; {sorted(layouts)} have")
        loss = registry.build(BALANCE_LOSSES, own, BalanceLossContext({i: layouts[i] for i in sorted(layers)}), where)
        part = registry.part(BALANCE_LOSSES, own, where)
        _refuse(part, promises.loss_built(loss), loss)
        name = str(node["name"])
        repeats = sum(1 for other in config.moe.balance_losses[:index] if other["name"] == name)
        tag = name if repeats == 0 else f"{name}_{repeats + 1}"
        losses.append(NamedLoss(tag, loss, where, part.owner, layers, schedule, part.ours))
    return losses


def resolve_model(config: ModelConfig, registry: Registry) -> None:
    """Write every default of the chosen plugins into the config, in place: what is stored beside the run."""
    if config.rope_scaling is not None:
        config.rope_scaling = registry.resolve(ROPE_SCALINGS, as_part(config.rope_scaling), ROPE_SCALINGS.key)
    if config.attention is not None:
        config.attention = registry.resolve(ATTENTIONS, config.attention, ATTENTIONS.key)
    config.activation = registry.resolve(ACTIVATIONS, config.activation, ACTIVATIONS.key)
    moe = config.moe
    if moe is None:
        return
    points: tuple[ExtensionPoint[Any, Any], ...] = (EXPERT_LAYOUTS, ROUTERS, SHARED_EXPERTS, EXPERT_BACKENDS)
    for point in points:
        key = point.key.rpartition(".")[2]
        setattr(moe, key, registry.resolve(point, getattr(moe, key), point.key))
    for index, node in enumerate(moe.balance_losses):
        where = f"model.moe.balance_losses.{index}"
        own, _, _ = split_common(node, where)
        common = {key: node[key] for key in COMMON_KEYS if node.get(key) is not None}
        moe.balance_losses[index] = registry.resolve(BALANCE_LOSSES, own, where) | common


def positional_parts(
    config: ModelConfig, registry: Registry
) -> tuple[list[AttentionKernel | None], RopeScaling | None]:
    """The attention of each layer, None for full, and the scaling of the rotary embedding, None for plain."""
    kernels: list[AttentionKernel | None] = [None] * config.num_hidden_layers
    scaling = None
    if config.attention is not None:
        part = registry.part(ATTENTIONS, config.attention, ATTENTIONS.key)
        for layer_id in range(config.num_hidden_layers):
            kernel = registry.build(ATTENTIONS, config.attention, attention_context(config, layer_id), ATTENTIONS.key)
            _refuse(part, attention_built(kernel, sinks=config.attention_sinks), kernel)
            if config.latent_attention is not None and not isinstance(kernel, TurnedKernel):
                raise ConfigError(
                    f"model.attention: '{part.name}' turns whole heads by positions of its own, and latent attention "
                    "only a part of them; take full or sliding_window, or a model without model.latent_attention"
                )
            kernels[layer_id] = kernel
    if config.rope_scaling is not None:
        context = RopeContext(config.rotary_head_dim, config.rope_theta, config.max_position_embeddings)
        scaling = registry.build(ROPE_SCALINGS, config.rope_scaling, context, ROPE_SCALINGS.key)
        part = registry.part(ROPE_SCALINGS, config.rope_scaling, ROPE_SCALINGS.key)
        _refuse(part, scaling_built(scaling), scaling)
        if scaling is not None:
            _try_scaling(part, scaling, config)
    return kernels, scaling


def _try_scaling(part: PluginPart, scaling: RopeScaling, config: ModelConfig) -> None:
    """Ask it for frequencies once, so that one that fails does before the model is made; with values, in a plan too."""
    with unset_fake_temporarily(), torch.device("cpu"):
        plain, _ = Rope(config.rotary_head_dim, config.rope_theta).frequencies(torch.device("cpu"))
        for length in (1, 2 * config.max_position_embeddings):
            with part.blamed():
                found = scaling(plain.clone(), length)
            _refuse(part, scaled(found, plain), scaling)


def reposition(
    model: Transformer,
    registry: Registry,
    *,
    attention: Mapping[str, Any] | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
) -> None:
    """Give a model another attention, or another scaling of its rotary embedding, its weights as they are.

    Each a part, {name: ..., options}; None leaves what it has. Raises ConfigError as `build_model`, with nothing done.
    """
    changed = copy.copy(model.config)
    changed.attention = model.config.attention if attention is None else dict(attention)
    changed.rope_scaling = model.config.rope_scaling if rope_scaling is None else dict(rope_scaling)
    changed.check()
    kernels, scaling = positional_parts(changed, registry)
    model.take_positions(changed, kernels, scaling)


def moe_context(
    config: ModelConfig, layout: ExpertLayout, layer_id: int, activation: Activation | None = None
) -> MoEContext:
    """What the router and the shared expert of a layer are built from; `activation` None: SwiGLU."""
    return MoEContext(
        hidden_size=config.hidden_size,
        num_experts=layout.num_experts,
        num_experts_per_tok=layout.num_experts_per_tok,
        moe_intermediate_size=layout.moe_intermediate_size,
        intermediate_size=config.intermediate_size,
        layer_id=layer_id,
        num_hidden_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        initializer_range=config.initializer_range,
        allow_noncausal=config.moe is not None and config.moe.allow_noncausal,
        activation=activation or SwiGLU(),
        mlp_bias=config.mlp_bias,
    )


def _mlps(config: ModelConfig, registry: Registry) -> Iterator[MLP | MoEBlock]:
    if config.moe is None:
        for layer_id in range(config.num_hidden_layers):
            yield _dense(config, _activation(config, registry, layer_id))
        return
    for layer_id, parts in enumerate(layer_parts(config.moe, config.num_hidden_layers)):
        yield _mlp(config, registry, parts, layer_id)


def _dense(config: ModelConfig, activation: Activation) -> MLP:
    return MLP(config.hidden_size, config.intermediate_size, activation, config.mlp_bias)


def _activation(config: ModelConfig, registry: Registry, layer_id: int) -> Activation:
    context = ActivationContext(config.hidden_size, layer_id, config.num_hidden_layers)
    activation = registry.build(ACTIVATIONS, config.activation, context, ACTIVATIONS.key)
    _refuse(
        registry.part(ACTIVATIONS, config.activation, ACTIVATIONS.key, layer_id),
        promises.activation_built(activation),
        activation,
    )
    return activation


def _mlp(config: ModelConfig, registry: Registry, parts: LayerParts, layer_id: int) -> MLP | MoEBlock:
    assert config.moe is not None
    layout = build_layout(config, registry, parts, layer_id)
    activation = _activation(config, registry, layer_id)
    if layout is None:
        return _dense(config, activation)
    context = moe_context(config, layout, layer_id, activation)
    named = {
        "router": registry.part(ROUTERS, parts.router, parts.where("router"), layer_id),
        "shared_expert": registry.part(SHARED_EXPERTS, parts.shared_expert, parts.where("shared_expert"), layer_id),
        "backend": registry.part(EXPERT_BACKENDS, parts.backend, parts.where("backend"), layer_id),
    }
    router = registry.build(ROUTERS, parts.router, context, named["router"].where)
    shared = registry.build(SHARED_EXPERTS, parts.shared_expert, context, named["shared_expert"].where)
    backend = _backend(config, registry, parts, layout, layer_id)
    _refuse(named["router"], promises.router_built(router), router)
    _refuse(named["shared_expert"], promises.shared_expert_built(shared), shared)
    _refuse(named["backend"], promises.backend_built(backend), backend)
    return MoEBlock(
        layout,
        layer_id,
        router,
        ExpertBank(layout, _expert_hidden_size(config), activation, bias=config.mlp_bias),
        backend,
        shared,
        latent=_latent(config),
        chunk=config.moe.expert_chunk,
        parts=named,
    )


def _expert_hidden_size(config: ModelConfig) -> int:
    """Of what the routed experts read and write. Raises ConfigError for a latent space that is none."""
    assert config.moe is not None
    config.moe.check_latent(config.hidden_size, "model.moe")
    return config.moe.moe_latent_size or config.hidden_size


def _latent(config: ModelConfig) -> LatentProjection | None:
    moe = config.moe
    if moe is None or moe.moe_latent_size is None:
        return None
    norm = config.rms_norm_eps if moe.moe_latent_norm else None
    return LatentProjection(config.hidden_size, moe.moe_latent_size, norm)


def _refuse(part: PluginPart, fault: str | None, built: object) -> None:
    if fault is not None:
        raise part.fault(fault, built)


def _backend(
    config: ModelConfig, registry: Registry, parts: LayerParts, layout: ExpertLayout, layer_id: int
) -> ExpertBackend:
    width, where = _expert_hidden_size(config), parts.where("backend")
    return backend_of(registry, parts.backend, layout, width, layer_id, where=where)


def backend_of(
    registry: Registry, node: Mapping[str, Any], layout: ExpertLayout, width: int, layer_id: int, *, where: str
) -> ExpertBackend:
    """The backend that `node` names, for experts on rows of `width` numbers, and able to build all the others."""

    def context(above: frozenset[str]) -> BackendContext:
        """`above`: the backends that this one is built for, so that none is built inside itself."""

        def others() -> Mapping[str, ExpertBackend]:
            names = [name for name in registry.components(EXPERT_BACKENDS) if name not in above]
            return {
                name: registry.build(EXPERT_BACKENDS, {"name": name}, context(above | {name}), where) for name in names
            }

        return BackendContext(layout, width, layer_id, others)

    return registry.build(EXPERT_BACKENDS, node, context(frozenset({str(node.get("name"))})), where)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A plugin's constructor may draw from torch's global stream: fix it, and put it back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def describe_model(model: Transformer) -> dict[str, Any]:
    """Which class computes each sparse layer, for logs and summaries."""
    blocks = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoEBlock)]
    return {"backends": sorted({block.backend.name for block in blocks}), "sparse_layers": len(blocks)}
