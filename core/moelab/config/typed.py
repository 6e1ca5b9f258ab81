"""A plain tree -> dataclasses, by their type hints. Complaints name the key; nothing is converted that would lose.

A `str` takes the characters typed, an `int` no fraction, a `float` every number, a `bool` the words for it.
`dict[str, Any]` keeps `Plain` scalars for the registry, which knows the plugin's options and types them in turn.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from moelab.config.overlay import overlay
from moelab.config.scalars import MISSING_TEXT, Plain, meaning, number_of, quoted, settle, spelled
from moelab.errors import ConfigError
from moelab.paths import unresolved_hint

SchemaT = TypeVar("SchemaT")
_TRUE, _FALSE = frozenset({"true", "yes", "y", "on", "1"}), frozenset({"false", "no", "n", "off", "0"})
_LARGEST = 2**63


class KeyProblem(ConfigError):
    """What is wrong with one key of a tree; `key` is its path below the tree's root."""

    def __init__(self, key_path: tuple[str, ...], problem: str) -> None:
        self.key, self.problem = ".".join(key_path), problem
        super().__init__(f"{self.key or 'config'}: {problem}")


@dataclasses.dataclass(frozen=True)
class Typing:
    """How scalars in places without a type (`Any`) are left, and what a number may be.

    A number is finite, unless its field's default is not: then who wrote the field means infinity to be one.
    """

    settled: bool  # True: as what they mean; False: as `Plain`, to be typed later
    unresolved: bool = False  # True: `${...}` may stand where a number belongs, as characters

    def build(self, schema: type[SchemaT], tree: Any, path: tuple[str, ...] = (), default: Any = None) -> SchemaT:
        """An instance of the dataclass `schema`; what `tree` leaves out comes from `default`, or the fields' own.

        Raises KeyProblem for an unknown key, a wrong type, or a value that is still missing.
        """
        if not isinstance(tree, Mapping):
            raise KeyProblem(path, f"must be a mapping of keys, not {_what(tree)}; leave the key out for its defaults")
        hints = typing.get_type_hints(schema)
        fields = {field.name: field for field in dataclasses.fields(schema) if field.init}  # type: ignore[arg-type]
        for key in tree:
            if key not in fields:
                raise KeyProblem((*path, str(key)), f"no such key; it takes: {', '.join(fields)}")
        values = {}
        for name, field in fields.items():
            standard = getattr(default, name) if default is not None else default_of(field)
            inner = (*path, name)
            if _is_missing(tree.get(name, standard), name in tree):
                raise KeyProblem(inner, f"has no value yet; set it in a file or as {'.'.join(inner)}=...")
            if name in tree:
                values[name] = self.convert(tree[name], hints[name], inner, standard)
            elif dataclasses.is_dataclass(standard) and not isinstance(standard, type):
                values[name] = self.build(type(standard), {}, inner, standard)
            else:
                values[name] = standard
        return schema(**values)

    def convert(self, value: Any, hint: Any, path: tuple[str, ...], default: Any = None) -> Any:
        """`value` as `hint` wants it. Raises KeyProblem."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any or hint is object:
            return settle(value) if self.settled else value
        if origin in (typing.Union, types.UnionType):
            return self._either(value, arguments, path, default)
        if origin is typing.Annotated:
            return self.convert(value, arguments[0], path, default)
        if origin is typing.Literal:
            return self._one_of(value, arguments, path)
        if dataclasses.is_dataclass(hint):
            return self.build(hint, value, path, default)  # type: ignore[arg-type]
        if origin in (list, Sequence) or hint is list:
            given = overlay(default, dict(value)) if isinstance(value, Mapping) and isinstance(default, list) else value
            return self._items(given, arguments[0] if arguments else Any, path)
        if origin is tuple or hint is tuple:
            return tuple(self._items(value, arguments[0] if arguments else Any, path))
        if origin in (dict, Mapping) or hint is dict:
            return self._mapping(value, arguments[1] if arguments else Any, path, default)
        return self._scalar(value, hint, path, default)

    def _scalar(self, value: Any, hint: Any, path: tuple[str, ...], default: Any) -> Any:
        if hint is str:
            return _text(value, path)
        if self.unresolved and isinstance(value, str) and "${" in value:
            return str(value)
        if hint is bool:
            return _boolean(value, path)
        if hint is int:
            return _integer(value, path)
        if hint is float:
            return self._number(value, path, default)
        if hint is Path:
            return Path(_text(value, path))
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return hint[self._one_of(value, tuple(hint.__members__), path)]
        if isinstance(hint, type) and isinstance(value, hint):
            return value
        raise KeyProblem(path, f"is of type {getattr(hint, '__name__', hint)}, which a config can't hold")

    def _either(self, value: Any, arms: tuple[Any, ...], path: tuple[str, ...], default: Any) -> Any:
        if types.NoneType in arms and (value is None or (isinstance(value, Plain) and meaning(value) is None)):
            return None
        rest = [arm for arm in arms if arm is not types.NoneType]
        if len(rest) > 1:  # the arm that the value already is, first; text, which takes nearly all, last
            meant = settle(value)
            rest.sort(key=lambda arm: (not _fits(meant, arm), arm is str))
        problem: KeyProblem | None = None
        for arm in rest:
            try:
                return self.convert(value, arm, path, default)
            except KeyProblem as error:
                problem = problem or error
        assert problem is not None, arms
        raise problem

    def _one_of(self, value: Any, choices: tuple[Any, ...], path: tuple[str, ...]) -> Any:
        for choice in choices:
            if value == choice or settle(value) == choice or (isinstance(choice, str) and str(value) == choice):
                return choice
        raise KeyProblem(path, f"must be one of {', '.join(map(str, choices))}, not {quoted(value)}")

    def _items(self, value: Any, hint: Any, path: tuple[str, ...]) -> list[Any]:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise KeyProblem(path, f"must be a list, not {_what(value)}; write [..., ...]")
        return [self.convert(item, hint, (*path, str(i))) for i, item in enumerate(value)]

    def _mapping(self, value: Any, hint: Any, path: tuple[str, ...], default: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            cure = f"; write {'.'.join(path)}.name={value}" if isinstance(default, dict) and "name" in default else ""
            raise KeyProblem(path, f"must be a mapping of keys, not {_what(value)}{cure if _word(value) else ''}")
        merged = overlay(default, dict(value)) if isinstance(default, dict) else value
        name = merged.get("name")
        if hint is Any and isinstance(name, Mapping | list):  # a part's
            raise KeyProblem((*path, "name"), f"must be a word, not {_what(name)}")
        return {str(key): self.convert(item, hint, (*path, str(key))) for key, item in merged.items()}

    def _number(self, value: Any, path: tuple[str, ...], default: Any) -> float:
        number = _numeric(value)
        if number is None:
            raise _unfit(value, "Float", path)
        try:
            result = float(number)
        except OverflowError:
            result = math.inf
        endless = isinstance(default, float) and math.isinf(default)
        if math.isnan(result) or (math.isinf(result) and not endless):
            raise KeyProblem(path, f"must be a finite number, not {quoted(value)}")
        return result


SCHEMA = Typing(settled=False)  # a config: its parts are typed by the registry
OPTIONS = Typing(settled=True)  # of a plugin


def default_of(field: dataclasses.Field[Any]) -> Any:
    """MISSING_TEXT where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING_TEXT if field.default is dataclasses.MISSING else field.default


def _is_missing(value: Any, given: bool) -> bool:
    """A default of `???`, or `???` typed without quotes: in quotes it is a text."""
    return isinstance(value, str) and value == MISSING_TEXT and (isinstance(value, Plain) or not given)


def _text(value: Any, path: tuple[str, ...]) -> str:
    if isinstance(value, Plain):
        if meaning(value) is None:
            shown = f"'{value}'" if value else "nothing"
            raise KeyProblem(path, f"must be a text, and {shown} without quotes is null; put it in quotes")
        return str(value)
    if isinstance(value, str):
        return value
    if value is None:
        raise KeyProblem(path, "must be a text, not null; write 'null' in quotes for the word")
    if isinstance(value, bool | int | float):
        return spelled(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise KeyProblem(path, f"must be a text, not {_what(value)}; put it in quotes")


def _boolean(value: Any, path: tuple[str, ...]) -> bool:
    if isinstance(value, bool):
        return value
    word = spelled(value).lower() if isinstance(value, str | int) else ""
    if word in _TRUE | _FALSE:
        return word in _TRUE
    raise KeyProblem(path, f"Value {quoted(value)} is not a valid bool (type {_type(value)}); write true or false")


def _integer(value: Any, path: tuple[str, ...]) -> int:
    number = _numeric(value)
    if isinstance(number, float) and math.isfinite(number):
        if not number.is_integer():
            raise KeyProblem(path, f"Value {quoted(value)} is no whole number, so it can't be converted to Integer")
        number = int(number)
    if not isinstance(number, int):
        raise _unfit(value, "Integer", path)
    if not -_LARGEST <= number < _LARGEST:
        raise KeyProblem(path, f"Value {quoted(value)} is too large for an Integer of 64 bits")
    return number


def _numeric(value: Any) -> int | float | None:
    """The number that a value is or spells. A bool is none."""
    if isinstance(value, str):
        text = value.strip()
        if text.lower().lstrip("+-") in ("inf", "nan", "infinity"):
            return float(text)
        return number_of(text) if len(text) <= 400 else None
    return None if isinstance(value, bool) or not isinstance(value, int | float) else value


def _unfit(value: Any, wanted: str, path: tuple[str, ...]) -> KeyProblem:
    why = f"Value {quoted(value)} of type '{_type(value)}' could not be converted to {wanted}"
    return KeyProblem(path, why + unresolved_hint(value))


def _type(value: Any) -> str:
    meant = settle(value)
    return "str" if isinstance(meant, str) else type(meant).__name__


def _fits(value: Any, arm: Any) -> bool:
    kind = typing.get_origin(arm) or arm
    if dataclasses.is_dataclass(kind):
        return isinstance(value, Mapping)
    return isinstance(kind, type) and type(value) is kind


def _word(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


def _what(value: Any) -> str:
    """A value for "must be ..., not ...": its kind where it is long."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return "null" if settle(value) is None else quoted(value)
