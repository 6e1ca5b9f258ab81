"""Laying one config over another."""

from __future__ import annotations

from typing import Any


def overlay(base: Any, over: Any) -> Any:
    """`over` on top of `base`, both plain containers.

    Mappings merge key by key, with one exception: where `name` changes, the part is replaced whole,
    because the options of the old component mean nothing to the new one. Lists are replaced, unless
    `over` is a mapping of indices, as `balance_losses.0.weight=0.01` makes.
    """
    if isinstance(base, list) and isinstance(over, dict) and over and all(_is_index(k, base) for k in over):
        return [overlay(item, over[_key(over, i)]) if _key(over, i) in over else item for i, item in enumerate(base)]
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if "name" in over and "name" in base and over["name"] != base["name"]:
        return over
    return base | {key: overlay(base.get(key), value) for key, value in over.items()}


def _is_index(key: object, items: list[Any]) -> bool:
    return str(key).isdigit() and int(str(key)) < len(items)


def _key(over: dict[Any, Any], index: int) -> Any:
    return index if index in over else str(index)
