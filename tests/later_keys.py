"""A version of moelab that is still to come: a key that no config has today, or another default of one that it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from typing import Any

from moelab.config import stored

MADE = {"__init__", "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__"}  # by `dataclass`


@contextmanager
def later(schema: Any, key: str, kind: str, default: Any) -> Iterator[None]:
    """Within it the dataclass has this field, as its last one, or this default of one that it has."""
    before = dict(vars(schema))
    own = dict(before.get("__annotations__", {}))
    for field in fields(schema):
        if field.name in own and (field.metadata or field.default_factory is not MISSING):
            setattr(schema, field.name, field)  # as it was written
    schema.__annotations__ = own | {key: kind}
    setattr(schema, key, default)
    for name in MADE & vars(schema).keys():  # else it leaves them as they are
        delattr(schema, name)
    dataclass(frozen=schema.__dataclass_params__.frozen)(schema)
    stored.schemas_in.cache_clear()
    try:
        yield
    finally:
        for name in vars(schema).keys() - before.keys():
            delattr(schema, name)
        for name, value in before.items():
            if vars(schema).get(name) is not value:
                setattr(schema, name, value)
        stored.schemas_in.cache_clear()
