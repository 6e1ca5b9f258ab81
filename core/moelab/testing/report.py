"""Running all checks of a kind and saying which failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from moelab.components import Component
from moelab.config.typed import OPTIONS
from moelab.plugin_faults import place_in, place_of, quoted

CaseT = TypeVar("CaseT")


class ConformanceError(AssertionError):
    """A plugin breaks its contract; the message lists every check that failed and why."""


def run_checks(
    kind: str, component: Component[Any, Any], case: CaseT, checks: Sequence[Callable[[CaseT], None]]
) -> None:
    """Run every check; raise ConformanceError with all failures, each reason once."""
    failures: dict[str, list[str]] = {}  # reason -> checks
    for check in checks:
        try:
            check(case)
        except Exception as error:  # a plugin may raise anything at all, and the other checks still say something
            kind_of = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            reason = f"{kind_of}{quoted(error)}{place_in(error, component.owner)}"
            failures.setdefault(reason, []).append(check.__name__)
    if failures:
        count = sum(map(len, failures.values()))
        raise ConformanceError(
            f"{kind} '{component.name}' ({component.owner}) fails {count} of {len(checks)} checks:\n"
            + "\n".join(f"  {names[0]}{_others(names)}: {reason}" for reason, names in failures.items())
        )


def promised(fault: str | None, built: object = None) -> None:
    """Raise AssertionError for a broken promise, as `PluginPart.fault` words it, with the place of its code."""
    if fault is not None:
        raise AssertionError(f"{fault}{place_of(built)}")


def _others(names: Sequence[str]) -> str:
    return "" if len(names) == 1 else f" (and {len(names) - 1} more: {', '.join(names[1:])})"


def make_options(component: Component[Any, Any], given: Any) -> Any:
    """The component's options: an instance, a mapping of some of them, or None for the defaults."""
    if given is None or isinstance(given, Mapping):
        return OPTIONS.build(component.options, dict(given or {}))
    return given
