"""Equal shares, as far as the text reaches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moelab import Component, MixContext, Mixer, Phase, component, hookimpl


@dataclass
class BalancedOptions:
    max_epochs: float | None = None  # how often a domain may be read; what it lacks goes to the others. null: no limit
    tokens: int | None = None  # that the run reads, which the limit is reckoned with; null: those of train.steps
    domains: list[str] | None = None  # that are read, patterns such as code_* or */yes too; null: all

    def __post_init__(self) -> None:
        if self.max_epochs is not None and not (math.isfinite(self.max_epochs) and self.max_epochs > 0):
            raise ValueError(f"max_epochs: {self.max_epochs} is no number above 0")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens: {self.tokens}; at least 1")


def balanced(options: BalancedOptions, context: MixContext) -> Mixer:
    """Every domain the same share, but none read more than `max_epochs` times over.

    From the smallest domain on, each gets an equal part of what is left, or all that its limit allows. Where the whole
    text under the limit is less than the run reads, every domain reaches its limit, and the shares are those of what
    there is.

    Source: UniMax, 2304.09151; its algorithm was not opened: held to what PyPI's `unimax-sampling` prints for it.
    Use: kinds of text of very different sizes, none of which should be learnt by heart.
    Cost: none; what repeats is told when the run begins.
    """
    left, shares = float(options.tokens or context.tokens), {}
    read = context.among(options.domains)
    for count, (name, tokens) in enumerate(sorted(read.items(), key=lambda item: (item[1], item[0]))):
        equal = left / (len(read) - count)
        shares[name] = equal if options.max_epochs is None else min(equal, options.max_epochs * tokens)
        left -= shares[name]
    return Mixer([Phase(shares)])


@hookimpl
def moelab_mixers() -> list[Component[MixContext, Mixer]]:
    return [component("balanced", BalancedOptions, balanced)]
