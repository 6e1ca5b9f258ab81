"""More experts: copies of those that are there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from omegaconf import MISSING

from moelab import Component, ConfigError, Evidence, LayerPlan, Surgery, SurgeryContext, component, hookimpl
from moelab.layouts import MOST_EXPERTS
from moelab_plugins.surgeries._counts import NOT_DECLARED, check_top_k, copies_of

BY = ("even", "load", "saliency", "weight_norm")


@dataclass
class GrowOptions:
    num_experts: int = MISSING  # after it
    num_experts_per_tok: int | None = None  # null: as it is
    by: str = "even"  # which are copied: even, or the best by load, saliency (REAP's) or weight_norm (Amazon's default)
    max_copies: int = 3  # of one expert, unless by is even
    noise: float = 0.0  # on a copy's weights, in the standard deviation of its matrix; Amazon's copy_noise: 0.01
    row_noise: float = 0.0  # on a copy's row of the router, in the standard deviation of the router's matrix

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise ValueError(f"by must be one of {', '.join(BY)}, not '{self.by}'")
        if self.max_copies < 1 or min(self.noise, self.row_noise) < 0:
            raise ValueError("max_copies must be at least 1, noise and row_noise not negative")


class Grow:
    """Copies of experts, with their rows of the router and their moments.

    Exact where every expert gets equally many copies, num_experts_per_tok grows by the same factor m, there is no noise
    and the router is a plain top-K: the K best become the mK best, m equal ones of each, and m copies of weight w / m
    add up to one of weight w. Sigmoids that are not normalised give each copy the whole weight; then each down
    projection is divided by m. With K as it is, copies take places from other experts, and nothing is exact.
    Source: expert upcycling (amazon-science/expert-upcycling d42f7c6): K fixed, rows copied, the most useful experts
    first and at most three times each, moments copied. Its paper was not opened. Departures: the moments are those of
    the gradient that each copy gets (1/m of it), and noise on rows is that of the whole matrix; theirs falls on biases.
    Use: capacity at the same compute. Copies that are always chosen together learn the same for ever: give noise, or
    use split.
    Cost: the parameters of the copies.
    """

    def __init__(self, options: GrowOptions, context: SurgeryContext) -> None:
        self.options, self.context, layout = options, context, context.layout
        if options.num_experts <= layout.num_experts:
            raise ConfigError(f"num_experts: {options.num_experts} is not more than the {layout.num_experts} there are")
        if options.num_experts > MOST_EXPERTS:
            raise ConfigError(f"num_experts: must be {MOST_EXPERTS} at most, not {options.num_experts}")
        copies = options.num_experts - layout.num_experts
        if options.by != "even" and copies > options.max_copies * layout.num_experts:
            raise ConfigError(
                f"max_copies: {options.max_copies} of each of {layout.num_experts} experts do not make {copies} more"
            )
        self.top_k = check_top_k(options.num_experts_per_tok, layout.num_experts_per_tok, options.num_experts)
        self.needs = frozenset({options.by} & {"load", "saliency"})

    def plan(self, evidence: Evidence) -> LayerPlan:
        options, layout, rows = self.options, self.context.layout, self.context.rows
        counts = self._counts(evidence)
        factor = counts[0] if len(set(counts)) == 1 else 0
        together = factor > 0 and self.top_k == factor * layout.num_experts_per_tok
        down = 1 / factor if together and rows.copies == "whole" else 1.0
        share = 1.0 if together and rows.copies == "whole" else None
        experts = [
            new
            for expert, count in enumerate(counts)
            for new in copies_of(
                expert, count, share=1 / count if share is None else share, down=down,
                noise=options.noise, row_noise=options.row_noise,
            )
        ]  # fmt: skip
        exact, because, warnings = self._exactness(factor, together)
        return LayerPlan(tuple(experts), self.top_k, layout.moe_intermediate_size, exact, because, warnings)

    def _exactness(self, factor: int, together: bool) -> tuple[bool, str, tuple[str, ...]]:
        if not together:
            return False, "copies take places among the K best from other experts", ()
        if self.context.rows.copies is None:
            return False, NOT_DECLARED, ()
        if self.options.noise or self.options.row_noise:
            return False, "there is noise on the copies", ()
        same = "copies that are always chosen together learn the same for ever; give noise, or use split"
        return True, f"{factor} equal experts are chosen where one was, and their weights add up to its own", (same,)

    def _counts(self, evidence: Evidence) -> list[int]:
        """How many new experts each becomes."""
        options, count = self.options, self.context.layout.num_experts
        if options.by == "even":
            each, rest = divmod(options.num_experts, count)
            return [each + (expert < rest) for expert in range(count)]
        left = options.num_experts - count
        counts = [1] * count
        for expert in np.argsort(-self._scores(evidence), kind="stable").tolist():
            taken = min(left, options.max_copies)
            counts[expert] += taken
            left -= taken
        return counts

    def _scores(self, evidence: Evidence) -> np.ndarray:
        if self.options.by != "weight_norm":
            return evidence.measured(self.options.by)
        return np.asarray(evidence.read("experts.gate_up").double().flatten(1).norm(dim=1).numpy())


@hookimpl
def moelab_surgeries() -> list[Component[SurgeryContext, Surgery]]:
    return [component("grow", GrowOptions, Grow)]
