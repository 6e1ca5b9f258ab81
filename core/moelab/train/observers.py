"""The observers of one run: a pluggy manager of its own, asked between steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pluggy

from moelab import hookspecs
from moelab.config.model import Part
from moelab.errors import ConfigError
from moelab.hookspecs import OBSERVERS
from moelab.registry import Registry

PREFIX = "on_"


class ObserverManager(pluggy.PluginManager):
    """Every method named `on_...` is a hook, without a marker; a misspelt one is an error."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        return {} if name.startswith(PREFIX) else None


def gather_observers(
    nodes: Sequence[Part], registry: Registry, run_dir: Path, extra: Sequence[object]
) -> ObserverManager:
    """The config's observers in order, then `extra`. Raises ConfigError for a method that is no hook."""
    manager = ObserverManager("moelab")
    manager.add_hookspecs(hookspecs.RunHooks)
    built = [registry.build(OBSERVERS, node, run_dir, f"observers.{index}") for index, node in enumerate(nodes)]
    try:
        for observer in reversed([*built, *extra]):  # pluggy calls the last registered first
            manager.register(observer)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise ConfigError(f"observers: {error}") from error
    return manager
