"""What the loaded plugins say of themselves: for `moelab plugins` and for the pages of docs/plugins/."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moelab.components import Component
from moelab.hookspecs import EXTENSION_POINTS, ExtensionPoint
from moelab.registry import Registry, option_fields

_FIELD = re.compile(r"^\s+(\w+)\s*:[^#\n]*#\s*(.+)$", re.MULTILINE)
_SECTION = re.compile(r"^(Formula|Source|Inference|Use|Cost):\s*", re.MULTILINE)


@dataclass(frozen=True)
class OptionEntry:
    """One key beside `name`."""

    name: str
    type: str
    default: str
    comment: str  # what stands behind the field in the source


@dataclass(frozen=True)
class PluginEntry:
    """One selectable part."""

    extension_point: str
    key: str  # of the config
    name: str
    owner: str
    summary: str
    options: list[OptionEntry]
    sections: dict[str, str]  # {"": the text before the first, "Formula": ...}


def describe_plugins(registry: Registry) -> list[PluginEntry]:
    """Every plugin of every extension point, in their order."""
    return [entry for point in EXTENSION_POINTS for entry in describe_point(registry, point)]


def describe_point(registry: Registry, point: ExtensionPoint[Any, Any]) -> Iterator[PluginEntry]:
    """The plugins of one extension point, by name."""
    for name, component in registry.components(point).items():
        comments = option_comments(component)
        options = [
            OptionEntry(key, kind, default, comments.get(key, "")) for key, kind, default in option_fields(component)
        ]
        text = inspect.getdoc(component.build) or ""
        sections = _sections(text.partition("\n")[2])
        yield PluginEntry(point.kind, point.key, name, component.owner, component.summary, options, sections)


def option_comments(component: Component[Any, Any]) -> dict[str, str]:
    """{option: the comment behind its field}, base classes included; empty where there is no source."""
    found: dict[str, str] = {}
    for owner in reversed(component.options.__mro__):
        try:
            source = inspect.getsource(owner)
        except (OSError, TypeError):
            continue
        found |= {name: comment.strip() for name, comment in _FIELD.findall(source)}
    return found


def _sections(text: str) -> dict[str, str]:
    """Split a docstring's body at its "Formula:", "Source:", ... lines; lines are joined."""
    pieces = _SECTION.split(text.strip())
    names = ["", *pieces[1::2]]
    return {name: " ".join(body.split()) for name, body in zip(names, pieces[0::2], strict=True) if body.strip()}
