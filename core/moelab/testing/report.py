"""Running all checks of a kind and saying which failed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from moelab.components import Component
from moelab.config.typed import OPTIONS
from moelab.plugin_faults import place_in, place_of, quoted

CaseT = TypeVar("CaseT")
_PLACE = re.compile(r"\.py:[0-9]+\)")


class ConformanceError(AssertionError):
    """A plugin breaks its contract; the message lists every check that failed and why."""


def run_checks(
    kind: str, component: Component[Any, Any], case: CaseT, checks: Sequence[Callable[[CaseT], None]]
) -> None:
    """Run every check; raise ConformanceError with all failures, each reason once.

    The first check is what the others build on: where it fails, they would tell its consequences, and are not run.
    """
    failures: dict[str, list[str]] = {}  # reason -> checks
    for check in checks:
        try:
            check(case)
        except Exception as error:  # a plugin may raise anything at all, and the other checks still say something
            failures.setdefault(_reason(error, component), []).append(check.__name__)
            if check is checks[0]:
                break
    if not failures:
        return
    lines = [f"  {names[0]}{_others(names)}: {reason}" for reason, names in failures.items()]
    count = f"{sum(map(len, failures.values()))} of {len(checks)} checks"
    if checks[0].__name__ in failures[next(iter(failures))] and len(checks) > 1:
        count, rest = "the first check", len(checks) - 1
        lines.append(f"  the other {rest} build on it, and were not run")
    raise ConformanceError(f"{kind} '{component.name}' ({component.owner}) fails {count}:\n" + "\n".join(lines))


def _reason(error: Exception, component: Component[Any, Any]) -> str:
    """What went wrong, with the place in the plugin: where it raised, else where its part begins."""
    kind_of = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    said = quoted(error)
    place = place_in(error, component.owner)
    if not place and not _PLACE.search(said):
        place = place_of(component.build)
    return f"{kind_of}{said}{place}"


def promised(fault: str | None, built: object = None) -> None:
    """Raise AssertionError for a broken promise, as `PluginPart.fault` words it, with the place of its code."""
    if fault is not None:
        raise AssertionError(f"{fault}{place_of(built)}")


def _others(names: Sequence[str]) -> str:
    more = len(names) - 1
    return "" if not more else f" (and {more} more check{'s' if more > 1 else ''})"


def make_options(component: Component[Any, Any], given: Any) -> Any:
    """The component's options: an instance, a mapping of some of them, or None for the defaults."""
    if given is None or isinstance(given, Mapping):
        return OPTIONS.build(component.options, dict(given or {}))
    return given
