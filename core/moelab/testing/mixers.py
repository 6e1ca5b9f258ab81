"""What every mixer must do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moelab.components import Component
from moelab.data.mixing import MixContext, Mixer, shares
from moelab.plugin_faults import article
from moelab.testing.report import make_options, promised, run_checks

DOMAINS = {"code": 40_000, "prose": 100_000, "maths": 9_000}


@dataclass
class MixerCase:
    """One mixer under test, with options that fit `context`."""

    component: Component[MixContext, Mixer]
    options: Any = None
    context: MixContext = field(default_factory=lambda: MixContext(DOMAINS, 50_000))

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)

    def build(self, context: MixContext | None = None) -> Mixer:
        mixer = self.component.build(self.options, context or self.context)
        fault = None if isinstance(mixer, Mixer) else f"returned {article(mixer)}; it must return a moelab.Mixer"
        promised(fault, self.component.build)
        return mixer


def gives_shares_of_the_domains(case: MixerCase) -> None:
    """Each phase's weights are numbers from 0 up of domains that are there, not all of them 0."""
    for phase in case.build().phases:
        shares(phase.weights, list(case.context.domains))


def gives_the_same_again(case: MixerCase) -> None:
    """A run that is resumed reads what it would have read."""
    assert case.build() == case.build(), "other phases at the second asking"


def does_not_hang_on_the_order_of_domains(case: MixerCase) -> None:
    """The order in which domains are listed says nothing."""
    turned = MixContext(dict(reversed(list(case.context.domains.items()))), case.context.tokens)
    names = list(case.context.domains)
    for one, other in zip(case.build().phases, case.build(turned).phases, strict=True):
        a, b = shares(one.weights, names), shares(other.weights, names)
        assert np.allclose(a, b, rtol=1e-9, atol=0), f"shares {a} and, with the domains turned round, {b}"


MIXER_CHECKS: tuple[Callable[[MixerCase], None], ...] = (
    gives_shares_of_the_domains,
    gives_the_same_again,
    does_not_hang_on_the_order_of_domains,
)


def check_mixer(
    component: Component[MixContext, Mixer], options: Any = None, *, domains: dict[str, int] | None = None
) -> None:
    """Run every check of MIXER_CHECKS; raises ConformanceError naming those that fail. `domains`: {name: tokens}."""
    case = MixerCase(component, options, MixContext(domains or DOMAINS, 50_000))
    run_checks("mixer", component, case, MIXER_CHECKS)
