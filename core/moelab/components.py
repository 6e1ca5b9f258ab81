"""What a plugin hands to the core: a name, the options it understands, and how to build it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any, Generic, TypeVar

OptionsT = TypeVar("OptionsT")
ContextT_contra = TypeVar("ContextT_contra", contravariant=True)
BuiltT_co = TypeVar("BuiltT_co", covariant=True)
ABSENT = "absent"  # in a field's metadata


@dataclass(frozen=True)
class Component(Generic[ContextT_contra, BuiltT_co]):
    """Made by `component()`, which checks that `build` takes these very options."""

    name: str  # what `name:` in a config selects
    options: type  # a dataclass; its fields are the legal keys beside `name`
    build: Callable[[Any, ContextT_contra], BuiltT_co]
    overrides: bool  # True: replaces a component of the same name
    owner: str  # the module to blame

    @property
    def summary(self) -> str:
        """The first line of what `build` says about itself."""
        return (self.build.__doc__ or "").strip().split("\n")[0]


def came_later(before: Any) -> dict[str, Any]:
    """`field(default=..., metadata=came_later(VALUE))`: a key or option that is newer than what it is a key of.

    VALUE is what was so without it, for ever, whatever the default becomes: where a config says it, weights are of the
    recipe that they were of before (`moelab_lineage.json`).
    """
    return {ABSENT: before}


def component(
    name: str,
    options: type[OptionsT],
    build: Callable[[OptionsT, ContextT_contra], BuiltT_co],
    *,
    overrides: bool = False,
) -> Component[ContextT_contra, BuiltT_co]:
    """Declare one selectable part: `{name: NAME, ...fields of options}` in a config builds it."""
    if not (isinstance(options, type) and is_dataclass(options)):
        raise TypeError(f"component '{name}': options must be a dataclass, not {options!r}")
    return Component(name, options, build, overrides, owner=build.__module__)
