"""Options that a plugin has gained since a run was stored: what its config can't say is the option's default.

Only the plugin knows it, and it is asked only where runs of one part differ in which options they name. One that is not
installed here leaves its part as it was written, and that is told.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from moelab.across_versions import parts_of
from moelab.config.differing import BOOKKEEPING
from moelab.config.run import RunConfig
from moelab.errors import ConfigError
from moelab.hookspecs import EXTENSION_POINTS, ExtensionPoint
from moelab.registry import Registry
from moelab_tools.compare.runs import Run

logger = logging.getLogger("moelab")
Parts = dict[tuple[str, str], list[dict[str, Any]]]  # (key of the extension point, name) -> every such part


def fill_in(runs: Sequence[Run]) -> None:
    """Write today's defaults into the runs' parts, in place, where another run of the same part names the option."""
    parts: Parts = {}
    for run in runs:
        for point, part in parts_of(run.config, RunConfig):
            if not point.key.startswith(BOOKKEEPING):
                parts.setdefault((point.key, part["name"]), []).append(part)
    apart = {place: found for place, found in parts.items() if len({frozenset(part) for part in found}) > 1}
    if not apart:
        return
    points = {point.key: point for point in EXTENSION_POINTS}
    try:
        registry = Registry(points=[points[key] for key in {key for key, _ in apart}])
    except ConfigError as error:
        logger.warning("options that some runs don't name are compared as they were written: %s", error)
        return
    for (key, name), found in apart.items():
        _fill(registry, points[key], name, found)


def _fill(registry: Registry, point: ExtensionPoint[Any, Any], name: str, found: Sequence[dict[str, Any]]) -> None:
    complete = [registry.filled(point, part) for part in found]
    named = {option for part in found for option in part}
    lacking = sorted(option for option in named if any(option not in part for part in found))
    if None in complete:
        logger.warning(
            "%s '%s' is not installed here, so runs that don't name its option%s %s are compared as they were written",
            point.kind, name, "s" * (len(lacking) > 1), ", ".join(lacking),
        )  # fmt: skip
        return
    for part, whole in zip(found, complete, strict=True):
        part.update(whole or {})
