"""Plugins of installed packages: entry points of group `moelab`, and what one may offer, told without importing it."""

from __future__ import annotations

from collections.abc import Collection
from importlib.abc import InspectLoader
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any

from moelab.errors import ConfigError
from moelab.plugin_faults import ANYTHING

GROUP = "moelab"


def installed_plugins() -> dict[str, EntryPoint]:
    """{"distribution:entry point": entry point}, in alphabetical order: the same on every machine."""
    found = {f"{point.dist.name if point.dist else '?'}:{point.name}": point for point in entry_points(group=GROUP)}
    return dict(sorted(found.items()))


def may_offer(point: EntryPoint, hooks: Collection[str]) -> bool:
    """Whether the entry point's module could implement one of `hooks`.

    pluggy looks for a hook's name among the names of the module, so a source that says none of them has none. True
    also where the source can't tell: it is not Python, imports `*`, or the entry point is an object in a module.
    """
    if point.attr:
        return True
    source = _source(point.module)
    return source is None or "import *" in source or any(hook in source for hook in hooks)


def load_plugin(name: str, point: EntryPoint) -> Any:
    """The module or object. ConfigError, naming the package, for whatever it raises."""
    try:
        return point.load()
    except ANYTHING as error:
        raise ConfigError(
            f"plugins: the entry point '{name}' ({point.value}) of an installed package can't be loaded: {error!r}; "
            "mend or uninstall the package, or set entry_points=false"
        ) from error


def _source(module: str) -> str | None:
    """The text of a module, for which neither it nor its parents are imported; None where there is none."""
    name, *rest = module.split(".")
    try:
        spec = find_spec(name)
    except ValueError:  # already imported, by hand, and without a spec
        return None
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    if spec is None or not isinstance(spec.loader, InspectLoader):
        return None
    try:
        return spec.loader.get_source(name)
    except (ImportError, SyntaxError, UnicodeDecodeError):  # importing it will say what is wrong
        return None
