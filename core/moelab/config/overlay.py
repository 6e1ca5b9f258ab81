"""Laying one config over another."""

from __future__ import annotations

import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any


def overlay(base: Any, over: Any, schema: Any = None) -> Any:
    """`over` on top of `base`, both plain containers; `schema` is the dataclass they stand for, if any.

    Mappings merge key by key, with one exception: where the `name` of a part (a mapping that is no dataclass)
    changes, the part is replaced whole, because the options of the old component mean nothing to the new one.
    Lists are replaced, unless `over` is a mapping of indices, as `balance_losses.0.weight=0.01` makes.
    """
    if isinstance(base, list) and isinstance(over, dict) and over and all(_is_index(k, base) for k in over):
        return [overlay(item, over[_key(over, i)]) if _key(over, i) in over else item for i, item in enumerate(base)]
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    sections = section_schemas(schema)
    if not sections and "name" in over and "name" in base and over["name"] != base["name"]:
        return over
    return base | {key: overlay(base.get(key), value, sections.get(str(key))) for key, value in over.items()}


def section_schemas(schema: Any) -> dict[str, Any]:
    """{field: its dataclass, or None} of a dataclass; nothing for anything else. `X | None` counts as X."""
    if not (isinstance(schema, type) and is_dataclass(schema)):
        return {}
    hints = typing.get_type_hints(schema)
    return {field.name: _dataclass_in(hints[field.name]) for field in fields(schema)}


def _dataclass_in(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next((arm for arm in typing.get_args(hint) if is_dataclass(arm)), None)
    return hint if is_dataclass(hint) else None


def _is_index(key: object, items: list[Any]) -> bool:
    return str(key).isdigit() and int(str(key)) < len(items)


def _key(over: dict[Any, Any], index: int) -> Any:
    return index if index in over else str(index)
