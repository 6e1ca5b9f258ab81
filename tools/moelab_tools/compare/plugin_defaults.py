"""Options that a plugin has gained since a run was stored: what its config can't say is the option's default.

Only the plugin knows it, and it is asked only where runs of one part differ in which options they name. One that is not
installed here leaves its part as it was written, and that is told.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from moelab.config.differing import BOOKKEEPING
from moelab.config.stages import PLACES
from moelab.errors import ConfigError
from moelab.hookspecs import EXTENSION_POINTS, ExtensionPoint
from moelab.registry import Registry
from moelab_tools.compare.runs import Run

logger = logging.getLogger("moelab")
POINTS = {point.key: point for point in EXTENSION_POINTS if not point.key.startswith(BOOKKEEPING)}
Parts = dict[tuple[str, str], list[dict[str, Any]]]  # (key of the extension point, name) -> every such part


def fill_in(runs: Sequence[Run]) -> None:
    """Write today's defaults into the runs' parts, in place, where another run of the same part names the option."""
    parts: Parts = {}
    for run in runs:
        for point, part in _parts(run.config, ()):
            parts.setdefault((point.key, part["name"]), []).append(part)
    apart = {place: found for place, found in parts.items() if len({frozenset(part) for part in found}) > 1}
    if not apart:
        return
    try:
        registry = Registry(points=[POINTS[key] for key in {key for key, _ in apart}])
    except ConfigError as error:
        logger.warning("options that some runs don't name are compared as they were written: %s", error)
        return
    for (key, name), found in apart.items():
        _fill(registry, POINTS[key], name, found)


def _fill(registry: Registry, point: ExtensionPoint[Any, Any], name: str, found: Sequence[dict[str, Any]]) -> None:
    defaults = registry.defaults(point, name)
    named = {option for part in found for option in part}
    lacking = sorted(option for option in named if any(option not in part for part in found))
    if defaults is None:
        logger.warning(
            "%s '%s' is not installed here, so runs that don't name its option%s %s are compared as they were written",
            point.kind, name, "s" * (len(lacking) > 1), ", ".join(lacking),
        )  # fmt: skip
        return
    for part in found:
        part |= {option: default for option, default in defaults.items() if option not in part}


def _parts(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[ExtensionPoint[Any, Any], dict[str, Any]]]:
    """Every part that stands where the config keeps one; a list's places are its own, a stage's its section's."""
    if isinstance(tree, list):
        for one in tree:
            yield from _parts(one, path)
    if not isinstance(tree, dict):
        return
    point = POINTS.get(".".join((PLACES[path[1]], path[1]) if _in_stage(path) else path))
    if point is not None and isinstance(tree.get("name"), str):
        yield point, tree
    for key, value in tree.items():
        yield from _parts(value, (*path, str(key)))


def _in_stage(path: Sequence[str]) -> bool:
    return len(path) == 2 and path[0] == "stages" and path[1] in PLACES
