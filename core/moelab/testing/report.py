"""Running all checks of a kind and saying which failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from moelab.components import Component
from moelab.config.typed import OPTIONS

CaseT = TypeVar("CaseT")


class ConformanceError(AssertionError):
    """A plugin breaks its contract; the message lists every check that failed and why."""


def run_checks(
    kind: str, component: Component[Any, Any], case: CaseT, checks: Sequence[Callable[[CaseT], None]]
) -> None:
    """Run every check; raise ConformanceError with all failures."""
    failures = []
    for check in checks:
        try:
            check(case)
        except Exception as error:  # a plugin may raise anything at all, and the other checks still say something
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            kind_of = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            failures.append(f"  {check.__name__}: {kind_of}{reason}")
    if failures:
        raise ConformanceError(
            f"{kind} '{component.name}' ({component.owner}) fails {len(failures)} of {len(checks)} checks:\n"
            + "\n".join(failures)
        )


def make_options(component: Component[Any, Any], given: Any) -> Any:
    """The component's options: an instance, a mapping of some of them, or None for the defaults."""
    if given is None or isinstance(given, Mapping):
        return OPTIONS.build(component.options, dict(given or {}))
    return given
