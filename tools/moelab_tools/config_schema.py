"""A JSON Schema of the config files, for editors that complete keys, check values and show what each is for.

Draft 7, the newest that yaml-language-server takes (its README, "Features"). A config file says only what differs from
its `base`, so no key is required; `${...}` may stand for every value, and `name` may be left to the base.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any

from moelab.config.comments import field_comments
from moelab.config.keys import ConfigKey, config_keys
from moelab.hookspecs import BALANCE_LOSSES, EXTENSION_POINTS
from moelab.moe.per_layer import LAYER_KEYS
from moelab.moe.schedule import WeightSchedule
from moelab.registry import Registry
from moelab_tools.describe_plugins import PluginEntry, describe_point

DRAFT = "http://json-schema.org/draft-07/schema#"
BASE = {"type": "string", "description": "A config file that this one, or this section, is laid over."}
# What moelab reads as a number and YAML 1.2 as a text (1_000, 0b1), an interpolation, and `???` for no value yet.
NUMBER_TEXT = r"\$\{|^\?\?\?$|^[-+]?[0-9][0-9_.a-fA-FxobeE+-]*$"
TRUTH_TEXT = r"\$\{|^(true|false|yes|no|on|off|y|n)$"
SCALARS: dict[Any, dict[str, Any]] = {
    str: {"type": ["string", "number", "boolean"]},  # a text stays the characters typed
    int: {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": NUMBER_TEXT}]},
    float: {"anyOf": [{"type": "number"}, {"type": "string", "pattern": rf"{NUMBER_TEXT}|^[-+]?\.(inf|nan)$"}]},
    bool: {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": TRUTH_TEXT}]},
}
LAYERS = "model.moe.layers"


def config_schema(schema: type, registry: Registry, title: str) -> dict[str, Any]:
    """The schema of a config file for `schema`, a config dataclass, with the plugins and options of `registry`."""
    keys = list(config_keys(schema))
    used = {key.path for key in keys if key.names_plugins}
    points = [point for point in EXTENSION_POINTS if point.key in used]
    parts = {point.key: _part(list(describe_point(registry, point)), registry, point) for point in points}
    return {
        "$schema": DRAFT,
        "title": title,
        **_section(keys, ""),
        "definitions": parts,
    }


def _section(keys: list[ConfigKey], prefix: str) -> dict[str, Any]:
    """The object of the keys directly below `prefix`, and of their sections."""
    here = [key for key in keys if key.path.startswith(prefix) and "." not in key.path.removeprefix(prefix)]
    properties = {key.path.removeprefix(prefix): _key(key, keys) for key in here}
    return {"type": "object", "properties": {"base": BASE, **properties}, "additionalProperties": False}


def _key(key: ConfigKey, keys: list[ConfigKey]) -> dict[str, Any]:
    if key.section is not None:
        found = _section(keys, f"{key.path}.")
        if key.default is not None:
            found = {"anyOf": [found, {"type": "null"}]}
    elif key.part:
        one = {"$ref": f"#/definitions/{key.path}"}
        found = _listed(one) if key.words.startswith("list") else one
        return {"allOf": [found], "description": key.doc}  # beside a $ref draft 7 reads nothing
    elif key.path == LAYERS:
        parts = {part: {"$ref": f"#/definitions/model.moe.{part}"} for part in LAYER_KEYS}
        found = _mapping({"type": "object", "properties": parts, "additionalProperties": False})
    else:
        found = _value(key.hint)
    default = {} if key.default is None else {"default": _plain(key.default)}
    return found | {"description": key.doc} | default


def _part(entries: list[PluginEntry], registry: Registry, point: Any) -> dict[str, Any]:
    """A part: one of the plugins with its options, or the options alone where `name` is left to the base."""
    more = {"layers": SCALARS[str], "schedule": _options(WeightSchedule)} if point is BALANCE_LOSSES else {}
    components = registry.components(point)
    plugins = []
    for entry in entries:
        options = _options(components[entry.name].options)["properties"]
        name = {"const": entry.name, "description": entry.summary}
        plugins.append({
            "type": "object", "title": entry.name, "description": entry.summary,
            "properties": {"base": BASE, "name": name, **options, **more}, "additionalProperties": False,
        })  # fmt: skip
    names = {"enum": [entry.name for entry in entries], "description": point.text}
    return {"type": "object", "properties": {"name": names}, "anyOf": plugins}


def _options(options: type) -> dict[str, Any]:
    """The object of a plugin's options."""
    try:
        hints = typing.get_type_hints(options)
    except Exception:  # a stranger's: names that only a type checker knows
        hints = {}
    comments = field_comments(options)
    properties = {
        field.name: _value(hints.get(field.name, Any)) | {"description": comments.get(field.name, "")}
        for field in dataclasses.fields(options)
    }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _value(hint: Any) -> dict[str, Any]:
    """What may stand where a value of this type belongs."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in SCALARS:
        return SCALARS[hint]
    if hint is type(None):
        return {"type": "null"}
    if origin is typing.Annotated:
        return _value(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_value(arm) for arm in arguments]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (list, tuple):
        return _listed(_value(arguments[0]))
    if origin in (dict, Mapping):
        return _mapping(_value(arguments[1]))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _options(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": list(hint.__members__)}
    return {}


def _listed(one: dict[str, Any]) -> dict[str, Any]:
    """A list, or a mapping of positions, which changes single items of a base's list."""
    change = {"type": "object", "patternProperties": {"^[0-9]+$": one}, "additionalProperties": False}
    return {"anyOf": [{"type": "array", "items": one}, change]}


def _mapping(one: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": one}


def _plain(default: str) -> Any:
    from moelab.config.scalars import settle
    from moelab.config.text import read_tree

    return settle(read_tree(default, "default"))
