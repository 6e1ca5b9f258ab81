"""Variants made to cost what one of them does: the width of their experts, or of a dense FFN, is solved for.

Active parameters and FLOPs are those that the routers declare (`moelab.planning.match`); what a run served is counted,
and compared, when it has run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moelab.errors import ConfigError, near
from moelab.planning.match import MEASURES, Match, match_dense, match_layout
from moelab_tools.sweep.plan import PlannedRun, plan_run

FAR = 0.01  # relative: a match no nearer than this is told as a warning


@dataclass(frozen=True)
class Matching:
    """What is made equal, and by which number."""

    measure: str  # total, active or flops
    vary: str = "moe_intermediate_size"  # of the layout
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ConfigError(f"match: no '{self.measure}'{near(self.measure, MEASURES)} Known: {', '.join(MEASURES)}")


def match_variants(
    planned: dict[str, list[PlannedRun]], reference: str, how: Matching, out: Path, *, trust: bool = False
) -> tuple[dict[str, list[PlannedRun]], dict[str, Match]]:
    """-> (the runs with the matched number in their config, {variant: how it was matched}).

    Raises ConfigError where a variant sets that number itself, or can't get there.
    """
    found: dict[str, Match] = {}
    matched = dict(planned)
    for name, runs in planned.items():
        if name == reference:
            continue
        one = solve(runs[0], planned[reference][0], how)
        extra = f"{one.key}={one.value}"
        matched[name] = [plan_run(name, [*run.arguments, extra], out, trust=trust) for run in runs]
        found[name] = one
    return matched, found


def solve(run: PlannedRun, reference: PlannedRun, how: Matching) -> Match:
    """The number with which `run` costs what `reference` does. Raises ConfigError where the run sets it itself."""
    config, baseline = run.config, reference.config.model
    length = config.train.sequence_length
    try:
        if config.model.moe is None:
            found = match_dense(
                config.model, baseline, run.registry,
                measure=how.measure, multiple_of=how.multiple_of, sequence_length=length,
            )  # fmt: skip
        else:
            found = match_layout(
                config.model, baseline, run.registry,
                measure=how.measure, option=how.vary, multiple_of=how.multiple_of, sequence_length=length,
            )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"{error}; in matching the variant {run.variant} by {how.measure}") from error
    _refuse_set_by_variant(run, reference, found)
    return found


def _refuse_set_by_variant(run: PlannedRun, reference: PlannedRun, match: Match) -> None:
    """The number can't be both what is compared and what is solved for."""
    own = [one for one in run.arguments if one.startswith(f"{match.key}=") and one not in reference.arguments]
    if own:
        raise ConfigError(
            f"{match.key}: the variant {run.variant} sets it ({own[-1]}), and matching solves for it; vary another "
            "option of the layout with --vary, or leave the match out"
        )


def told(name: str, reference: str, match: Match) -> str:
    """A line for people."""
    text = (
        f"{name}: {match.key}={match.value} gives {match.found:,.0f} {match.measure} for the {match.wanted:,.0f} of "
        f"{reference} ({match.error:+.2%})"
    )
    return text + ("" if match.measure == "total" else ", as the routers declare")
