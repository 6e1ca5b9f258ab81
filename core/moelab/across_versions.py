"""A config across versions of moelab: the keys of its schema, and the options of its parts, that came after it.

`as_today` fills them in, for who compares what was stored with what is planned now. `as_ever` leaves them out where
they say what was so before they came (`components.came_later`), for a hash that must stay what it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from moelab.components import ABSENT
from moelab.config.scalars import settle
from moelab.config.stages import PLACES, StageConfig
from moelab.config.stored import filled, schemas_in
from moelab.hookspecs import EXTENSION_POINTS, ExtensionPoint
from moelab.registry import Registry

Part = dict[str, Any]  # {name: ..., options}
_POINTS = {point.key: point for point in EXTENSION_POINTS}


def as_today(tree: Mapping[str, Any], schema: Any, registry: Registry, key: str = "") -> dict[str, Any]:
    """A stored tree with today's defaults of what it does not say; `key`: where in a config it stands.

    A part that is not installed stays as it is, and an option that its plugin has no more stays too.
    """
    found = filled(settle(tree), schema)
    for point, part in parts_of(found, schema, key):
        part.update(registry.filled(point, part) or {})
    return found


def as_ever(tree: Mapping[str, Any], schema: Any, registry: Registry, key: str = "") -> dict[str, Any]:
    """A tree of today without the keys and options that came later and say what was so before."""
    found = copy.deepcopy(dict(tree))
    for point, part in parts_of(found, schema, key):
        part_as_ever(point, part, registry)
    _leave_out(found, schema)
    return found


def part_as_ever(point: ExtensionPoint[Any, Any], part: Part, registry: Registry) -> Part:
    """`as_ever` of one part, in place."""
    chosen = registry.components(point).get(part["name"])
    if chosen is not None:
        _leave_out(part, chosen.options)
    return part


def parts_of(tree: Mapping[str, Any], schema: Any, key: str = "") -> Iterator[tuple[ExtensionPoint[Any, Any], Part]]:
    """Every part that stands where the schema's config keeps one, to be changed in place; also each of a list."""
    inner = schemas_in(schema)
    for name, value in tree.items():
        place = f"{PLACES[name]}.{name}" if schema is StageConfig and name in PLACES else f"{key}.{name}".lstrip(".")
        values = value if isinstance(value, list) else [value]
        for one in (one for one in values if isinstance(one, dict)):
            if name in inner:
                yield from parts_of(one, inner[name][isinstance(value, list)], place)
            elif place in _POINTS and isinstance(one.get("name"), str):
                yield _POINTS[place], one


def _leave_out(tree: dict[str, Any], schema: Any) -> None:
    inner = schemas_in(schema)
    for field in fields(schema):
        value = tree.get(field.name)
        for one in value if isinstance(value, list) else [value]:
            if field.name in inner and isinstance(one, dict):
                _leave_out(one, inner[field.name][isinstance(value, list)])
        if ABSENT in field.metadata and field.name in tree and tree[field.name] == field.metadata[ABSENT]:
            del tree[field.name]
