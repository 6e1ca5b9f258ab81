"""The extension points. THE FIRST FILE TO OPEN: a plugin is a module that implements one or more of these hooks.

A hook is asked once, while a run is being built, and answers with a list of Components. `build(options,
context)` of the chosen one returns a plain module or function: while tokens flow, no hook is called.
The observer hooks (last) are called by the trainer between steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from moelab.components import Component
    from moelab.data.corpus import Corpus, DataContext
    from moelab.initialisers import (
        ExpertInitialiser,
        OutputScaling,
        RouterInitialiser,
        SharedInitialiser,
        UpcycleContext,
    )
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

hookspec = pluggy.HookspecMarker("moelab")
hookimpl = pluggy.HookimplMarker("moelab")


@hookspec
def moelab_routers() -> list[Component[MoEContext, Router]]:  # type: ignore[empty-body]
    """Which experts each token goes to, and with what weight: x [T, D], info -> Routing."""


@hookspec
def moelab_shared_experts() -> list[Component[MoEContext, SharedExpert | None]]:  # type: ignore[empty-body]
    """The expert that every token passes through: x [T, D] -> [T, D]; None for no such expert."""


@hookspec
def moelab_expert_layouts() -> list[Component[LayoutContext, ExpertLayout | None]]:  # type: ignore[empty-body]
    """How many experts a layer has and how wide they are; None for a layer that stays dense."""


@hookspec
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:  # type: ignore[empty-body]
    """A term of the training loss that sees the routing: (records, context) -> scalar, unweighted."""


@hookspec
def moelab_expert_backends() -> list[Component[BackendContext, ExpertBackend]]:  # type: ignore[empty-body]
    """How the experts are computed: (x [T, D], routing, bank) -> [T, D]. Owns no parameters."""


@hookspec
def moelab_expert_initialisers() -> list[Component[UpcycleContext, ExpertInitialiser]]:  # type: ignore[empty-body]
    """Upcycling, axis `recipe.experts`: dense FFN neurons -> the routed experts of one layer."""


@hookspec
def moelab_shared_initialisers() -> list[Component[UpcycleContext, SharedInitialiser]]:  # type: ignore[empty-body]
    """Upcycling, axis `recipe.shared`: dense FFN neurons -> the shared expert of one layer."""


@hookspec
def moelab_router_initialisers() -> list[Component[UpcycleContext, RouterInitialiser]]:  # type: ignore[empty-body]
    """Upcycling, axis `recipe.router`: the router matrix of one layer."""


@hookspec
def moelab_output_scalings() -> list[Component[UpcycleContext, OutputScaling]]:  # type: ignore[empty-body]
    """Upcycling, axis `recipe.scaling`: the factor on the routed experts' down projections."""


@hookspec
def moelab_data_sources() -> list[Component[DataContext, Corpus]]:  # type: ignore[empty-body]
    """Where the text comes from: -> a tokenised corpus, split into training and held-out documents."""


@hookspec
def moelab_observers() -> list[Component[Path, object]]:  # type: ignore[empty-body]
    """build(options, run_dir) -> an object with any of the hooks of `RunHooks`."""


class RunHooks:
    """What an observer may implement, naming only the arguments it wants.

    Called on rank 0, between steps, with host numbers that are already reduced over micro-batches and ranks.
    """

    @hookspec
    def on_train_begin(self, run_dir: Path, config: Mapping[str, Any], facts: Mapping[str, Any], step: int) -> None:
        """Before the first step; `step` are done already when a run is resumed. `facts`: summary.json's, so far."""

    @hookspec
    def on_log(
        self,
        step: int,
        metrics: Mapping[str, float],
        loads: Mapping[int, list[float]],
        alarms: list[str],
        backends: list[str],
    ) -> None:
        """Every `train.log_every` steps. `loads`: layer -> each expert's share of the assignments, summing to 1.

        `alarms`: sentences about layers whose routing has come to nothing. `backends`: what computes the experts,
        with what `auto` chose so far and why.
        """

    @hookspec
    def on_evaluate(self, step: int, metrics: Mapping[str, float], samples: list[str]) -> None:
        """After each evaluation on held-out text, with the generated samples."""

    @hookspec
    def on_save(self, step: int, path: Path) -> None:
        """After a checkpoint is complete on disk."""

    @hookspec
    def on_train_end(self, step: int, summary: Mapping[str, Any], error: BaseException | None) -> None:
        """Last of all, also when the run failed."""
