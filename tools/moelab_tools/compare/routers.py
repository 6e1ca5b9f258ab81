"""How the routers of the runs fared: alarms that were raised, and whether a router learnt anything at all.

A run whose router has learnt nothing is a run of something else than its name says, so it is never called better: what
would be praised is not what it is named after. That it is worse may be said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moelab.alarms import LEARNT_NOTHING, Alarm
from moelab.errors import UserError
from moelab_tools.compare.runs import Run
from moelab_tools.compare.variants import Variant

NUMBERS = ("value", "threshold", "worst", "first_step", "last_step")
SHOWN = 5  # names in a list of runs
NEVER_BETTER = "Not to be called better"
SINCE = 3  # format_version of summary.json from which alarms are kept


@dataclass(frozen=True)
class RunAlarm:
    """One alarm of one run, over its whole length."""

    run: str
    name: str
    layer: int | None
    value: float  # as last measured while it was on
    threshold: float
    worst: float
    first_step: int
    last_step: int
    on: bool  # at the end of the run
    advice: str

    @property
    def nothing_learnt(self) -> bool:
        """Whether the run ended with a router that can't have learnt."""
        return self.on and self.name in LEARNT_NOTHING


def told(alarms: Sequence[RunAlarm], runs_of: Mapping[str, Sequence[str]]) -> list[str]:
    """One sentence for each kind of alarm of each variant: where, when, how bad at its worst layer, and what to do.

    runs_of: {variant: its runs}.
    """
    variant_of = {run: variant for variant, runs in runs_of.items() for run in runs}
    groups: dict[tuple[str, str, bool], list[RunAlarm]] = {}
    for alarm in sorted(alarms, key=lambda alarm: not alarm.on):
        groups.setdefault((variant_of.get(alarm.run, alarm.run), alarm.name, alarm.on), []).append(alarm)
    return [
        f"{_who(variant, found, len(runs_of.get(variant, ())))}: {name}{_when(found)}: {_worst(found)}"
        for (variant, name, _), found in groups.items()
    ]


def _who(variant: str, alarms: Sequence[RunAlarm], runs: int) -> str:
    """The run, or of a variant in how many of its runs."""
    affected = {alarm.run for alarm in alarms}
    return next(iter(affected)) if len(affected) == 1 else f"{variant}, {len(affected)} of {runs} runs"


def _when(alarms: Sequence[RunAlarm]) -> str:
    layers = sorted({alarm.layer for alarm in alarms if alarm.layer is not None})
    where = f", layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}" if layers else ""
    last = "the end" if alarms[0].on else str(max(alarm.last_step for alarm in alarms))
    return f"{where}, from step {min(alarm.first_step for alarm in alarms)} to {last}"


def _worst(alarms: Sequence[RunAlarm]) -> str:
    one = max(alarms, key=lambda alarm: abs(alarm.worst - alarm.threshold))
    return Alarm(one.name, None, one.worst, one.threshold, one.advice).sentence()


def alarms_of(run: Run) -> list[RunAlarm]:
    """What the run's summary keeps. Raises UserError, naming the file, for what is no alarm."""
    found = run.summary.get("alarms", [])
    try:
        return [_alarm(run.name, entry) for entry in found]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{run.path / 'summary.json'}: `alarms` are not what moelab writes ({error}); leave this run out, or train "
            "it again"
        ) from error


def _alarm(run: str, entry: Mapping[str, Any]) -> RunAlarm:
    layer, numbers = entry["layer"], [entry[key] for key in NUMBERS]
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers):
        raise TypeError(f"{', '.join(NUMBERS)} must be numbers")
    if not isinstance(entry["on"], bool) or not (layer is None or isinstance(layer, int)):
        raise TypeError("`on` must be true or false, `layer` a number or null")
    value, threshold, worst, first, last = numbers
    return RunAlarm(
        run, str(entry["name"]), layer, float(value), float(threshold), float(worst), int(first), int(last),
        entry["on"], str(entry["advice"]),
    )  # fmt: skip


def why_withheld(variants: Sequence[Variant]) -> dict[str, str]:
    """{variant: why it is never called better}: of those of which a counted run ended with an untaught router."""
    told = {}
    for variant in variants:
        causes: dict[str, list[RunAlarm]] = {}
        for run in variant.counted:
            for alarm in alarms_of(run):
                if alarm.nothing_learnt:
                    causes.setdefault(alarm.name, []).append(alarm)
        if causes:
            listing = "; ".join(_cause(name, alarms, len(variant.counted)) for name, alarms in causes.items())
            told[variant.name] = f"the router of {variant.name} has learnt nothing ({listing})"
    return told


def _cause(name: str, alarms: Sequence[RunAlarm], runs: int) -> str:
    """`untaught in layers 0, 1 of 2 of 3 runs`."""
    layers = sorted({alarm.layer for alarm in alarms if alarm.layer is not None})
    where = f" in layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}" if layers else ""
    affected = len({alarm.run for alarm in alarms})
    return f"{name}{where}" + (f" of {affected} of {runs} runs" if runs > 1 else "")


def by_design(variants: Sequence[Variant]) -> list[str]:
    """A fact, and no alarm: routers that follow a fixed rule."""
    told = []
    for variant in variants:
        fixed = variant.counted[0].summary.get("fixed_routers")
        if isinstance(fixed, Mapping) and fixed:
            kinds = ", ".join(sorted({str(kind) for kind in fixed.values()}))
            layers = ", ".join(sorted(map(str, fixed), key=lambda layer: (len(layer), layer)))
            told.append(
                f"{variant.name} routes by a fixed rule in layers {layers} ({kinds}): nothing to learn, by design"
            )
    return told


def frozen(variant: Variant) -> str | None:
    """How every word that the variant gets goes on, where its config keeps routers as they are."""
    kept = variant.counted[0].summary.get("frozen_routers")
    if not isinstance(kept, Mapping) or not kept:
        return None
    return f"router frozen by config ({', '.join(sorted({str(key) for key in kept.values()}))})"


def unknown(runs: Sequence[Run]) -> list[str]:
    """Runs with experts that kept no alarms."""
    names = [
        run.name
        for run in runs
        if run.config["model"].get("moe") and run.summary and run.summary.get("format_version", 1) < SINCE
    ]
    if not names:
        return []
    listing = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return [f"{listing}: trained by a version that kept no alarms, so nothing is known of how the routers fared"]
