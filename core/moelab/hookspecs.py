"""The extension points. THE FIRST FILE TO OPEN: a plugin is a module that implements one or more of these hooks.

A hook is asked once, while a run is being built, and answers with a list of Components. `build(options,
context)` of the chosen one returns a plain module or function: while tokens flow, no hook is called.
The observer hooks (last) are called by the trainer between steps.

One row of the table below is all that core knows of a kind of plugin: the hook, the key of the config and the folder
of the built-ins follow from it, and so do `moelab plugins` and docs/plugins/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pluggy

if TYPE_CHECKING:
    from moelab.alarms import Alarm, AlarmChange
    from moelab.config.rope_scaling import RopeContext
    from moelab.data.corpus import Corpus, DataContext
    from moelab.data.filtering import FilterContext, TextFilter
    from moelab.data.generating import GeneratorContext, TextGenerator
    from moelab.data.mixing import MixContext, Mixer
    from moelab.data.rewards import Reward, RewardContext
    from moelab.data.tagging import Tagger
    from moelab.dense_sources import DenseArchitecture
    from moelab.initialisers import (
        ExpertInitialiser,
        OutputScaling,
        RouterInitialiser,
        SharedInitialiser,
        UpcycleContext,
    )
    from moelab.moe.activation import Activation, ActivationContext
    from moelab.moe.contracts import (
        BackendContext,
        BalanceLoss,
        BalanceLossContext,
        ExpertBackend,
        MoEContext,
        Router,
        SharedExpert,
    )
    from moelab.moe.layout import ExpertLayout, LayoutContext
    from moelab.moe.probe import Probe
    from moelab.moe.surgery import Surgery, SurgeryContext
    from moelab.nn.attention_inputs import AttentionContext, AttentionKernel
    from moelab.nn.optimizing import Optimizer, OptimizerContext
    from moelab.nn.rope import RopeScaling

PROJECT = "moelab"
MARK = f"{PROJECT}_impl"  # the attribute by which pluggy marks a function
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

ContextT = TypeVar("ContextT")
BuiltT = TypeVar("BuiltT")


@dataclass(frozen=True)
class ExtensionPoint(Generic[ContextT, BuiltT]):
    """A kind of plugin: the hook answers with `Component[ContextT, BuiltT]`s, the config's key selects one by name."""

    kind: str  # as messages call it
    hook: str  # the function that a plugin module implements
    key: str  # of the config
    builtins: str  # the package whose modules are the built-in ones; a name with a leading underscore is no plugin
    text: str  # what is built, with its shapes
    check: str = ""  # of moelab.testing: the conformance check that a plugin of this kind must pass


ROUTERS: ExtensionPoint[MoEContext, Router] = ExtensionPoint(
    "router", "moelab_routers", "model.moe.router", "moelab_plugins.routers",
    "Which experts each token goes to, and with what weight: x [T, D], info -> Routing.",
    check="check_router",
)  # fmt: skip
SHARED_EXPERTS: ExtensionPoint[MoEContext, SharedExpert | None] = ExtensionPoint(
    "shared expert", "moelab_shared_experts", "model.moe.shared_expert", "moelab_plugins.shared_experts",
    "The expert that every token passes through: x [T, D] -> [T, D]; None for no such expert.",
    check="check_shared_expert",
)  # fmt: skip
ACTIVATIONS: ExtensionPoint[ActivationContext, Activation] = ExtensionPoint(
    "activation", "moelab_activations", "model.activation", "moelab_plugins.activations",
    "What stands between the matrices of every feed-forward part: (gate, up) [..., F] -> [..., F], or (up) alone.",
    check="check_activation",
)  # fmt: skip
EXPERT_LAYOUTS: ExtensionPoint[LayoutContext, ExpertLayout | None] = ExtensionPoint(
    "expert layout", "moelab_expert_layouts", "model.moe.layout", "moelab_plugins.expert_layouts",
    "How many experts a layer has and how wide they are; None for a layer that stays dense.",
    check="check_expert_layout",
)  # fmt: skip
BALANCE_LOSSES: ExtensionPoint[BalanceLossContext, BalanceLoss] = ExtensionPoint(
    "balance loss", "moelab_balance_losses", "model.moe.balance_losses", "moelab_plugins.balance_losses",
    "A term of the training loss that sees the routing: (records, context) -> scalar, unweighted.",
    check="check_balance_loss",
)  # fmt: skip
EXPERT_BACKENDS: ExtensionPoint[BackendContext, ExpertBackend] = ExtensionPoint(
    "expert backend", "moelab_expert_backends", "model.moe.backend", "moelab_plugins.expert_backends",
    "How the experts are computed: (x [T, D], routing, bank) -> [T, D]. Owns no parameters.",
    check="check_backend",
)  # fmt: skip
ATTENTIONS: ExtensionPoint[AttentionContext, AttentionKernel] = ExtensionPoint(
    "attention", "moelab_attentions", "model.attention", "moelab_plugins.attentions",
    "Which earlier tokens a query sees, and how far away: (query [B, H, S, d], key and value [B, G, S, d], inputs) -> "
    "[B, H, S, d]. Owns no parameters, turns query and key itself.",
    check="check_attention",
)  # fmt: skip
ROPE_SCALINGS: ExtensionPoint[RopeContext, RopeScaling | None] = ExtensionPoint(
    "rope scaling", "moelab_rope_scalings", "model.rope_scaling", "moelab_plugins.rope_scalings",
    "How the rotary embedding is stretched: (inv_freq [head_dim / 2], length) -> the same, and a factor on cos and "
    "sin; None for plain. Without torch until it is called.",
    check="check_rope_scaling",
)  # fmt: skip
OPTIMIZERS: ExtensionPoint[OptimizerContext, Optimizer] = ExtensionPoint(
    "optimizer", "moelab_optimizers", "optimizer.algorithm", "moelab_plugins.optimizers",
    "How gradients become a step: the named parameters that are trained -> a torch.optim.Optimizer.",
    check="check_optimizer",
)  # fmt: skip
EXPERT_INITIALISERS: ExtensionPoint[UpcycleContext, ExpertInitialiser] = ExtensionPoint(
    "expert initialiser", "moelab_expert_initialisers", "recipe.experts", "moelab_upcycling.initialisers.experts",
    "Upcycling, axis `recipe.experts`: dense FFN neurons -> the routed experts of one layer.",
    check="check_initialiser",
)  # fmt: skip
SHARED_INITIALISERS: ExtensionPoint[UpcycleContext, SharedInitialiser] = ExtensionPoint(
    "shared initialiser", "moelab_shared_initialisers", "recipe.shared", "moelab_upcycling.initialisers.shared",
    "Upcycling, axis `recipe.shared`: dense FFN neurons -> the shared expert of one layer.",
)  # fmt: skip
ROUTER_INITIALISERS: ExtensionPoint[UpcycleContext, RouterInitialiser] = ExtensionPoint(
    "router initialiser", "moelab_router_initialisers", "recipe.router", "moelab_upcycling.initialisers.router",
    "Upcycling, axis `recipe.router`: the router matrix of one layer.",
)  # fmt: skip
OUTPUT_SCALINGS: ExtensionPoint[UpcycleContext, OutputScaling] = ExtensionPoint(
    "output scaling", "moelab_output_scalings", "recipe.scaling", "moelab_upcycling.initialisers.scaling",
    "Upcycling, axis `recipe.scaling`: the factor on the routed experts' down projections.",
)  # fmt: skip
DENSE_SOURCES: ExtensionPoint[Mapping[str, Any], DenseArchitecture] = ExtensionPoint(
    "dense source", "moelab_dense_sources", "source", "moelab_upcycling.sources",
    "Which dense models can be read, by `model_type`: config.json's fields -> how fields and tensors are read.",
    check="check_dense_source",
)  # fmt: skip
DATA_SOURCES: ExtensionPoint[DataContext, Corpus] = ExtensionPoint(
    "data source", "moelab_data_sources", "data.source", "moelab_plugins.data_sources",
    "Where the text comes from: -> a tokenised corpus, split into training and held-out documents.",
    check="check_data_source",
)  # fmt: skip
TEXT_FILTERS: ExtensionPoint[FilterContext, TextFilter] = ExtensionPoint(
    "text filter", "moelab_text_filters", "stages", "moelab_plugins.text_filters",
    "A stage of `moelab data`: document -> the document, as it is or changed, or why it is left out.",
    check="check_text_filter",
)  # fmt: skip
TAGGERS: ExtensionPoint[FilterContext, Tagger] = ExtensionPoint(
    "tagger", "moelab_taggers", "tags", "moelab_plugins.taggers",
    "What `moelab data` notes of a document beside its domain: document -> one of a few words.",
    check="check_tagger",
)  # fmt: skip
REWARDS: ExtensionPoint[RewardContext, Reward] = ExtensionPoint(
    "reward", "moelab_rewards", "alignment.reward", "moelab_plugins.rewards",
    "What answers are worth, to `moelab align` and `moelab synthesise`: attempts -> a number for each.",
    check="check_reward",
)  # fmt: skip
GENERATORS: ExtensionPoint[GeneratorContext, TextGenerator] = ExtensionPoint(
    "generator", "moelab_generators", "generator", "moelab_plugins.generators",
    "Who answers what `moelab critique`, `moelab evolve` and `moelab tag` ask: questions -> a reply to each.",
    check="check_generator",
)  # fmt: skip
MIXERS: ExtensionPoint[MixContext, Mixer] = ExtensionPoint(
    "mixer", "moelab_mixers", "data.mixer", "moelab_plugins.mixers",
    "What share of the training tokens each domain gets, phase by phase.",
    check="check_mixer",
)  # fmt: skip
SURGERIES: ExtensionPoint[SurgeryContext, Surgery] = ExtensionPoint(
    "surgery", "moelab_surgeries", "surgery", "moelab_plugins.surgeries",
    "What `moelab surgery` does to a trained layer's experts: what was measured of them -> a plan of the new ones.",
    check="check_surgery",
)  # fmt: skip
OBSERVERS: ExtensionPoint[Path, object] = ExtensionPoint(
    "observer", "moelab_observers", "observers", "moelab_plugins.observers",
    "build(options, run_dir) -> an object with any of the hooks of `RunHooks`.",
    check="check_observer",
)  # fmt: skip

EXTENSION_POINTS: tuple[ExtensionPoint[Any, Any], ...] = tuple(
    row for row in list(globals().values()) if isinstance(row, ExtensionPoint)
)


def plugin_hooks() -> type:
    """The hooks of the table, as pluggy reads them: a class with one marked function for each row."""

    def specification(point: ExtensionPoint[Any, Any]) -> Any:
        def hook() -> None: ...

        hook.__name__, hook.__doc__ = point.hook, point.text
        return hookspec(hook)

    return type("PluginHooks", (), {point.hook: staticmethod(specification(point)) for point in EXTENSION_POINTS})


class RunHooks:
    """What an observer may implement, naming only the arguments it wants.

    Called on rank 0, between steps, with host numbers that are already reduced over micro-batches and ranks. One that
    raises is told of once and dropped, and the run goes on; KeyboardInterrupt and SystemExit end it.
    """

    @hookspec
    def on_train_begin(
        self, run_dir: Path, config: Mapping[str, Any], facts: Mapping[str, Any], step: int, checkpoint: Path | None
    ) -> None:
        """Before the first step, or when a run is resumed from `checkpoint`, where `step` are done already.

        `facts`: summary.json's, so far.
        """

    @hookspec
    def on_log(
        self,
        step: int,
        metrics: Mapping[str, float],
        loads: Mapping[int, list[float]],
        alarms: list[Alarm],
        changes: list[AlarmChange],
        backends: list[str],
    ) -> None:
        """Every `train.log_every` steps. `loads`: layer -> each expert's share of the assignments, summing to 1.

        `alarms`: those that are on; `changes`: which began, grew or ended since the last log. `backends`: what computes
        the experts, with what `auto` chose so far and why.
        """

    @hookspec
    def on_probe(self, step: int, probe: Probe) -> Mapping[str, float] | None:
        """Before the first step, every `train.probe_every` steps and after the last: one fixed held-out batch forward.

        What is returned is logged with the step's numbers, under the tags that it names (`moe/layer_03/mine`). Before
        the first step there is no log, so an observer keeps what it needs of that look.
        """

    @hookspec
    def on_evaluate(self, step: int, metrics: Mapping[str, float], samples: list[str]) -> None:
        """After each evaluation on held-out text, with the generated samples."""

    @hookspec
    def on_checkpoint(self, step: int) -> Mapping[str, bytes] | None:
        """Before a checkpoint is written: {name: content} of files that go into it, for `on_train_begin` to read.

        What an observer must remember to go on as if it had not been stopped: its files in the run folder may hold
        what it saw after the checkpoint.
        """

    @hookspec
    def on_save(self, step: int, path: Path) -> None:
        """After a checkpoint is complete on disk."""

    @hookspec
    def on_train_end(self, step: int, summary: Mapping[str, Any], error: BaseException | None) -> None:
        """Last of all, also when the run failed."""
