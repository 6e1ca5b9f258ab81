"""A mixer: what there is, but the smaller half of the domains counts twice."""

from __future__ import annotations

from dataclasses import dataclass

import moelab


@dataclass
class Options:
    factor: float = 2.0  # on the share of the smaller half of the domains


def my_mixer(options: Options, context: moelab.MixContext) -> moelab.Mixer:
    """Weights of `context.domains`, {name: training tokens}: one phase, to the end."""
    by_size = sorted(context.domains, key=lambda name: (context.domains[name], name))
    small = by_size[: len(by_size) // 2]
    weights = {name: tokens * (options.factor if name in small else 1.0) for name, tokens in context.domains.items()}
    return moelab.Mixer([moelab.Phase(weights)])


@moelab.hookimpl
def moelab_mixers() -> list[moelab.Component]:
    return [moelab.component("my_mixer", Options, my_mixer)]
