"""Every key of a config: its type, its default and what it is for, from the dataclasses and their comments."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moelab.config.comments import field_comments
from moelab.config.model import PART
from moelab.config.scalars import MISSING_TEXT, spelled
from moelab.errors import ConfigError, near


@dataclass(frozen=True)
class ConfigKey:
    """One key, or a section of keys."""

    path: str  # model.hidden_size
    hint: Any  # the type, `typing.Annotated` kept
    words: str  # the type in words
    default: str | None  # as YAML; None: it must be given, or is a section
    doc: str
    section: type | None = None  # the dataclass whose keys lie below
    part: bool = False  # {name: ..., options}, or a list of them: an extension point's
    required: bool = False

    @property
    def names_plugins(self) -> bool:
        """Whether an extension point of its path is its own: the `stages` of a run are sections, of `data` parts."""
        return self.words != "list of section"


def config_keys(schema: type, prefix: str = "", *, partial: bool = False) -> Iterator[ConfigKey]:
    """All keys of a config dataclass, in the order of the source, each section before what lies in it.

    `partial`: of a section that another source completes, so that no default of its own applies.
    """
    hints = typing.get_type_hints(schema, include_extras=True)
    comments = field_comments(schema)
    for field in dataclasses.fields(schema):
        path, hint = f"{prefix}{field.name}", hints[field.name]
        section = section_of(hint)
        default = None if partial or (section is not None and not _nullable(hint)) else default_of(field)
        doc = comments.get(field.name, "")
        if section is not None:
            own = inspect.getdoc(section) or ""
            doc = ". ".join(filter(None, (doc.rstrip("."), own.split("\n\n")[0].replace("\n", " "))))
        required = default is None and section is None and not partial
        yield ConfigKey(path, hint, type_words(hint), default, doc, section, is_part(hint), required)
        if section is not None:
            yield from config_keys(section, f"{path}.", partial=typing.get_origin(hint) is typing.Annotated)


def keys_under(schema: type, prefix: str) -> list[ConfigKey]:
    """The key `prefix` and those beneath it; all for "". Raises ConfigError, with the nearest, where there is none."""
    keys = list(config_keys(schema))
    found = [key for key in keys if not prefix or key.path == prefix or key.path.startswith(f"{prefix}.")]
    if not found:
        raise ConfigError(f"{prefix}: no such key{near(prefix, [key.path for key in keys])}")
    return found


def section_of(hint: Any) -> type | None:
    """The dataclass whose keys a value of this type holds: itself, `X | None`, or a mapping annotated with it."""
    for arm in _arms(hint):
        if typing.get_origin(arm) is typing.Annotated:
            return next((mark for mark in typing.get_args(arm)[1:] if dataclasses.is_dataclass(mark)), None)  # type: ignore[return-value]
        if isinstance(arm, type) and dataclasses.is_dataclass(arm):
            return arm
    return None


def is_part(hint: Any) -> bool:
    """Whether it selects a plugin, or a list of plugins."""
    if typing.get_origin(hint) in (list, typing.Union, types.UnionType):
        return is_part(typing.get_args(hint)[0])
    return typing.get_origin(hint) is typing.Annotated and PART in typing.get_args(hint)[1:]


def type_words(hint: Any) -> str:
    """A type as a person writes it: `int`, `float | null`, `list of part`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return "part" if PART in arguments[1:] else "section" if section_of(hint) else type_words(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_words(arm) for arm in arguments)
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin in (list, tuple) and arguments:
        return f"list of {type_words(arguments[0])}"
    if origin in (dict, Mapping) and len(arguments) == 2:
        return f"mapping to {type_words(arguments[1])}"
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return "section"
    names = {"str": "text", "dict": "mapping", "Any": "anything"}
    name = getattr(hint, "__name__", str(hint))
    return names.get(name, name)


def option_words(options: type) -> list[tuple[str, str, str]]:
    """(name, type, default) of each option of a plugin, in the words of the keys; `required` without a default."""
    try:
        hints = typing.get_type_hints(options)
    except Exception:  # a stranger's: names that only a type checker knows
        hints = {}
    rows = []
    for field in dataclasses.fields(options):
        default = default_of(field)
        kind = type_words(hints.get(field.name, field.type))
        rows.append((field.name, kind, "required" if default is None else default))
    return rows


def default_of(field: dataclasses.Field[Any]) -> str | None:
    """A field's default as YAML in one line; None where it must be given."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING or (isinstance(value, str) and value == MISSING_TEXT):
        return None
    return flow(value)


def flow(value: Any) -> str:
    """A plain value as YAML in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str):
        return value if value.isidentifier() and value not in ("null", "true", "false") else json.dumps(value)
    return spelled(value)


def _nullable(hint: Any) -> bool:
    return type(None) in _arms(hint)


def _arms(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
