"""What the built-in plugins say of themselves, kept beside their sources, so that listing them imports no torch.

`python -m moelab_tools.plugin_pages docs/plugins` writes it anew, and a test compares it with what the plugins say. A
source that is not the one which was described, or another set of them, makes it worth nothing: then plugins are asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moelab.errors import ConfigError
from moelab.hookspecs import EXTENSION_POINTS
from moelab.installed import installed_plugins, may_offer
from moelab.registry import builtin_modules
from moelab.safe_files import Reading, read_object, read_text
from moelab_tools.describe_plugins import OptionEntry, PluginEntry

OURS = Reading(ConfigError, "install moelab again")
FILE = Path(__file__).with_name("described.json")


def described(plugins: Iterable[str], entry_points: bool) -> list[PluginEntry] | None:
    """As `describe_plugins` of a registry of these; None: they have to be imported."""
    hooks = [point.hook for point in EXTENSION_POINTS]
    if list(plugins) or (entry_points and any(may_offer(one, hooks) for one in installed_plugins().values())):
        return None
    try:
        kept = read_object(FILE, OURS)
        if {name: one["source"] for name, one in kept.items()} != _sources():
            return None
        entries = [_entry(**one) for part in kept.values() for one in part["plugins"]]
    except (ConfigError, KeyError, TypeError):  # not there, or not ours
        return None
    order = {point.key: place for place, point in enumerate(EXTENSION_POINTS)}
    return sorted(entries, key=lambda entry: (order[entry.key], entry.name))


def text_of(entries: Iterable[PluginEntry]) -> str:
    """What the file has to say of the built-in plugins."""
    sources = _sources()
    mine: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}
    for entry in entries:
        mine[entry.owner].append(asdict(entry))
    found = {name: {"source": sources[name], "plugins": mine[name]} for name in sorted(sources)}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _sources() -> dict[str, str]:
    """{module: the hash of its source}, of the built-in ones."""
    found = {}
    for name in (module for point in EXTENSION_POINTS for module in builtin_modules(point)):
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None, name
        found[name] = hashlib.sha256(read_text(Path(spec.origin), OURS).encode()).hexdigest()[:16]
    return found


def _entry(options: list[dict[str, Any]], **rest: Any) -> PluginEntry:
    return PluginEntry(options=[OptionEntry(**option) for option in options], **rest)
