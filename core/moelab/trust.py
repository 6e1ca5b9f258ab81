"""Whose code runs: a folder of weights or results is data, so the plugin modules it names are not imported for it.

Code comes from entry points of installed packages, from modules that the user names (a config of theirs,
`plugins=[...]` on the command line), and, where the user says so, from what a folder names: docs/security.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moelab.config.run import RunConfig
from moelab.errors import CheckpointError
from moelab.registry import Registry


def stored_registry(
    config: RunConfig, folder: Path, *, registry: Registry | None = None, trust: bool = False
) -> Registry:
    """The plugins to build what `folder` holds by its stored `config`.

    `registry`: those that the user named, None for the installed ones. `trust`: whatever the config names, from where
    it says. Raises CheckpointError naming the modules that would be needed beside them.
    """
    if trust:
        return Registry(config.plugins, config.entry_points, config.places("plugins"))
    registry = registry or Registry(entry_points=config.entry_points)
    refuse_unknown([name for name in config.plugins if name not in registry.modules], folder, config.search_path)
    return registry


def refuse_unknown(names: Sequence[str], folder: Path, search_path: Sequence[str] = ()) -> None:
    """Raise CheckpointError for plugin modules that a folder names and the user did not; none: nothing happens."""
    if not names:
        return
    listed = ", ".join(map(str, names))
    places = f" (from {', '.join(map(str, search_path))})" if search_path else ""
    raise CheckpointError(
        f"{folder}: needs the plugin modules {listed}{places}, and code that a folder names is not run unasked. Name "
        f"them where a config is taken, plugins=[{listed}], if they are yours (in Python registry=Registry([...])); or "
        "read them and give --trust-plugins (trust=True)"
    )
