"""Shares that are written down, for the whole run or phase by phase."""

from __future__ import annotations

from dataclasses import dataclass, field

from moelab import Component, ConfigError, MixContext, Mixer, Phase, component, hookimpl


@dataclass
class WeightsOptions:
    weights: dict[str, float] = field(default_factory=dict)  # {domain: share}, in any unit; left out: not read
    # One after the other instead of `weights`: [{until: 800, weights: {web: 9, code: 1}}, {weights: {code: 1}}].
    # `until`: the step before which a phase ends, counted from the run's beginning; the last has none.
    phases: list[dict[str, object]] = field(default_factory=list)


def weights(options: WeightsOptions, context: MixContext) -> Mixer:
    """Each domain's share of the tokens as given, for the whole run or phase by phase.

    Source: what every report on pretraining does; phases as in Qwen2's (2407.10671, 3.1).
    Use: a mixture that is known, or a variant of one: more code towards the end.
    Cost: none; a small domain with a large share is read several times over, which is told.
    """
    if bool(options.weights) == bool(options.phases):
        raise ConfigError("weights: give `weights`, or `phases` that have them, and not both")
    if options.weights:
        return Mixer([Phase(options.weights)])
    return Mixer([_phase(number, phase) for number, phase in enumerate(options.phases)])


def _phase(number: int, given: dict[str, object]) -> Phase:
    where = f"phases.{number}"
    if unknown := sorted(given.keys() - {"until", "weights"}):
        raise ConfigError(f"{where}.{unknown[0]}: no such key; a phase has `until` and `weights`")
    until, found = given.get("until"), given.get("weights")
    if until is not None and (isinstance(until, bool) or not isinstance(until, int)):
        raise ConfigError(f"{where}.until: {until!r} is no whole number of steps")
    if not isinstance(found, dict) or not all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in found.values()
    ):
        raise ConfigError(f"{where}.weights: {found!r} is no table of domains and numbers, as {{code: 3, prose: 7}}")
    return Phase({str(name): float(value) for name, value in found.items()}, until)


@hookimpl
def moelab_mixers() -> list[Component[MixContext, Mixer]]:
    return [component("weights", WeightsOptions, weights)]
