"""Who set what: the file or override that each value of a config comes from, and a YAML text that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelab.config.files import Layer, config_folder
from moelab.config.interpolation import KeyPath, leaves
from moelab.config.overlay import overlay
from moelab.config.text import leaf_lines

LONGEST = 120  # characters of an origin in a comment


@dataclass(frozen=True)
class _Said:
    """A value that knows who said it; equal to its like, so that layers merge as they do without."""

    value: Any
    origin: str = field(compare=False)


def origins(layers: Sequence[Layer], schema: type) -> dict[KeyPath, str]:
    """{key path: file or override} of what the user set, merged as the config itself is.

    What a folder says of itself is left out, as defaults are: it says all there is.
    """
    merged: Any = {}
    for layer in layers:
        merged = overlay(merged, _said(layer.tree, "" if layer.data else short_origin(layer.origin)), schema)
    return {path: leaf.origin for path, leaf in leaves(merged) if isinstance(leaf, _Said) and leaf.origin}


def annotated(text: str, said_by: Mapping[KeyPath, str]) -> str:
    """YAML of `write_tree` with a comment behind each value that somebody set; what has none is a default."""
    lines = text.splitlines()
    for path, number in leaf_lines(text):
        origin = next((said_by[path[:n]] for n in range(len(path), 0, -1) if path[:n] in said_by), None)
        if origin is not None:
            lines[number] += f"  # {origin}"
    return "\n".join(lines) + "\n"


def short_origin(origin: str) -> str:
    """A shipped config by its name, a file as it lies from here, an override as it was typed; one line."""
    path = Path(origin)
    for folder in (config_folder(), Path.cwd()):
        if path.is_absolute() and path.is_relative_to(folder):
            origin = str(path.relative_to(folder))
            break
    line = " ".join(origin.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 4]} ..."


def _said(tree: Any, origin: str) -> Any:
    if isinstance(tree, Mapping):
        return {key: _said(value, origin) for key, value in tree.items()} or _Said({}, origin)
    if isinstance(tree, list):
        return [_said(value, origin) for value in tree] or _Said([], origin)
    return _Said(tree, origin)
