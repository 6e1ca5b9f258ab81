"""What the loaded plugins say of themselves: for `moelab plugins` and for the pages of docs/plugins/."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moelab.config.comments import field_comments
from moelab.config.keys import option_words
from moelab.errors import ConfigError, near
from moelab.hookspecs import EXTENSION_POINTS, ExtensionPoint
from moelab.registry import Registry

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


def plural(point: ExtensionPoint[Any, Any]) -> str:
    """ "balance losses": what several plugins of a kind are called."""
    return point.hook.removeprefix("moelab_").replace("_", " ")


def describe_plugins(registry: Registry) -> list[PluginEntry]:
    """Every plugin of every extension point, in their order."""
    return [entry for point in EXTENSION_POINTS for entry in describe_point(registry, point)]


def choose(entries: list[PluginEntry], words: Sequence[str]) -> tuple[list[PluginEntry], list[PluginEntry]]:
    """(those of the kinds, those of the names) that `words` say; no words: all, as of a kind.

    A kind goes by its name, one or many, its hook or its key. Raises ConfigError for a word that is neither.
    """
    if not words:
        return entries, []
    keys = {name: point.key for point in EXTENSION_POINTS for name in _names(point)}
    wanted = [word.replace("-", "_").replace(" ", "_") for word in words]
    for word, said in zip(wanted, words, strict=True):
        if word not in keys and not any(entry.name == word for entry in entries):
            kinds = [plural(point).replace(" ", "_") for point in EXTENSION_POINTS]
            close = near(word, [*(entry.name for entry in entries), *kinds])
            raise ConfigError(f"{said}: no plugin and no kind of plugins{close} Kinds: {', '.join(kinds)}")
    chosen = {keys[word] for word in wanted if word in keys}
    return [e for e in entries if e.key in chosen], [e for e in entries if e.key not in chosen and e.name in wanted]


def _names(point: ExtensionPoint[Any, Any]) -> tuple[str, ...]:
    many = plural(point).replace(" ", "_")
    return point.kind.replace(" ", "_"), many, point.hook, point.key


def describe_point(registry: Registry, point: ExtensionPoint[Any, Any]) -> Iterator[PluginEntry]:
    """The plugins of one extension point, by name."""
    for name, component in registry.components(point).items():
        comments = field_comments(component.options)
        options = [
            OptionEntry(key, kind, default, comments.get(key, ""))
            for key, kind, default in option_words(component.options)
        ]
        text = inspect.getdoc(component.build) or ""
        sections = _sections(text.partition("\n")[2])
        yield PluginEntry(point.kind, point.key, name, component.owner, component.summary, options, sections)


def _sections(text: str) -> dict[str, str]:
    """Split a docstring's body at its "Formula:", "Source:", ... lines; lines are joined."""
    pieces = _SECTION.split(text.strip())
    names = ["", *pieces[1::2]]
    return {name: " ".join(body.split()) for name, body in zip(names, pieces[0::2], strict=True) if body.strip()}
