"""The keys of a config as lines for a terminal: type, default and what each is for, and the options of plugins.

Only where a prefix names a key that selects plugins are these imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.abc import InspectLoader
from importlib.util import find_spec

from moelab.config.keys import ConfigKey, config_keys, keys_under
from moelab.config.run import RunConfig
from moelab.config.upcycle import UpcycleConfig
from moelab.errors import ConfigError, near
from moelab.hookspecs import EXTENSION_POINTS
from moelab.registry import Registry, builtin_modules
from moelab_tools.curate.declaration import CurateConfig
from moelab_tools.describe_plugins import OptionEntry, PluginEntry, describe_point
from moelab_tools.merging.declaration import MergeConfig
from moelab_tools.synthesis.declaration import CritiqueConfig, EvolveConfig, TagConfig

COMMANDS: dict[str, type] = {
    "train": RunConfig, "upcycle": UpcycleConfig, "data": CurateConfig, "merge": MergeConfig,
    "critique": CritiqueConfig, "evolve": EvolveConfig, "tag": TagConfig,
}  # fmt: skip
POINT_OF = {point.key: point for point in EXTENSION_POINTS}


@dataclass(frozen=True)
class Line:
    """A line of the listing; one without a `doc` is a heading."""

    text: str
    doc: str = ""
    indent: int = 0


def plugin_names(key: str) -> list[str]:
    """The built-in plugins that a key selects among, read off their sources: none is imported."""
    if key not in POINT_OF:
        return []
    sources = (_source(module) for module in builtin_modules(POINT_OF[key]))
    calls = (node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    named = (call.args[0] for call in calls if call.args and ast.unparse(call.func).rpartition(".")[2] == "component")
    return sorted(str(name.value) for name in named if isinstance(name, ast.Constant))


def _source(module: str) -> str:
    loader = getattr(find_spec(module), "loader", None)
    return (loader.get_source(module) or "") if isinstance(loader, InspectLoader) else ""


def known_keys(prefix: str) -> dict[str, list[ConfigKey]]:
    """{command: the keys under `prefix` that its configs take}; a plugin's option lies under the key of its part.

    Raises ConfigError where no command knows it.
    """
    found: dict[str, list[ConfigKey]] = {}
    for command, schema in COMMANDS.items():
        keys = list(config_keys(schema))
        if part := part_above(prefix):
            found[command] = [key for key in keys if key.path == part]
        elif any(key.path == prefix or key.path.startswith(f"{prefix}.") or not prefix for key in keys):
            found[command] = keys_under(schema, prefix)
    found = {command: keys for command, keys in found.items() if keys}
    if not found:
        every = dict.fromkeys(key.path for schema in COMMANDS.values() for key in config_keys(schema))
        raise ConfigError(f"--keys: no key '{prefix}'{near(prefix, every)} Sections: {', '.join(_sections())}")
    return found


def part_above(prefix: str) -> str | None:
    """The key that selects a plugin and is `prefix`, or lies above it: `data.source` of `data.source.text`."""
    return next((key for key in POINT_OF if prefix == key or prefix.startswith(f"{key}.")), None)


def key_lines(prefix: str, registry: Registry | None) -> Iterator[Line]:
    """The listing under `prefix`. `registry`: needed where `part_above` finds something."""
    told: set[Line] = set()
    for command, keys in known_keys(prefix).items():
        new = [line for line in map(_key_line, keys) if line not in told]  # many are the same for both
        told.update(new)
        if new:
            yield Line(f"moelab {command}")
            yield from new
    part = part_above(prefix)
    if part is not None and registry is not None:
        yield from _option_lines(part, prefix, registry)


def plugin_lines(entry: PluginEntry) -> Iterator[Line]:
    """One plugin with its options."""
    yield Line(entry.name, f"{entry.summary} ({entry.owner})")
    for option in entry.options:
        yield Line(_option_text(option), option.comment, indent=2)


def _option_lines(part: str, prefix: str, registry: Registry) -> Iterator[Line]:
    entries = list(describe_point(registry, POINT_OF[part]))
    wanted = prefix.removeprefix(part).lstrip(".").removeprefix("name").lstrip(".=")
    wanted = re.sub(r"^[0-9]+\.?", "", wanted)  # of an item of a list
    named = [entry for entry in entries if entry.name == wanted]
    having = [entry for entry in entries if any(option.name == wanted for option in entry.options)]
    if wanted and not named and not having:
        known = [*(entry.name for entry in entries), *(option.name for entry in entries for option in entry.options)]
        raise ConfigError(f"--keys: {part}: no plugin and no option '{wanted}'{near(wanted, known)}")
    for entry in named or having or entries:
        yield Line("")
        yield from (line for line in plugin_lines(entry) if not having or named or _is_about(line, wanted))


def _is_about(line: Line, option: str) -> bool:
    return line.indent == 0 or line.text.startswith(f"{option}:")


def _key_line(key: ConfigKey) -> Line:
    if key.section is not None:
        return Line(f"{key.path}:" + ("" if key.default is None else f" section = {key.default}"), key.doc)
    names = plugin_names(key.path) if key.names_plugins else []
    doc = f"{key.doc.rstrip('.')}; one of {', '.join(names)} (options: --keys {key.path})" if names else key.doc
    default = "required" if key.required else key.default
    return Line(f"{key.path}: {key.words}" + ("" if default is None else f" = {default}"), doc)


def _option_text(option: OptionEntry) -> str:
    return f"{option.name}: {option.type} = {option.default}"


def _sections() -> list[str]:
    keys = [key for schema in COMMANDS.values() for key in config_keys(schema) if "." not in key.path]
    return list(dict.fromkeys(key.path for key in keys if key.section or key.part))
