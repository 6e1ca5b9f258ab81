"""Typed access to what a stranger's JSON or YAML holds: each look says what must stand there, and complains by name.

`Record(str(path), read_object(path, reading), reading).integer("step", least=0)` is a number, or one error that names
the file, the key, what was found and the cure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from moelab.printable import printable
from moelab.safe_files import LARGEST_TEXT, Reading, kind_of, read_object

T = TypeVar("T")
REQUIRED: Any = object()  # as a default: the key must be there


@dataclass(frozen=True)
class Record:
    """A mapping, with the place that messages name: a file, a line of one, a key below it."""

    where: str
    values: Mapping[str, Any]
    reading: Reading

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: T = REQUIRED, *, least: int | None = None, most: int | None = None) -> int | T:
        """A whole number in least .. most. Null counts as absent, here and below: `default` stands for it."""
        value = self._found(key, default)
        if value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(key, "a whole number")
        if (least is not None and value < least) or (most is not None and value > most):
            self.refuse(key, f"a whole number in {'' if least is None else least} .. {'' if most is None else most}")
        return value

    def number(self, key: str, default: T = REQUIRED, *, least: float | None = None, finite: bool = True) -> float | T:
        """A number, at least `least`; NaN and infinity only where not `finite`."""
        value = self._found(key, default)
        if value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(key, "a number")
        if (finite and not math.isfinite(value)) or (least is not None and value < least):
            self.refuse(key, "a finite number" if least is None else f"a number, at least {least}")
        return float(value)

    def text(self, key: str, default: T = REQUIRED, *, longest: int = 4096) -> str | T:
        """A text of at most `longest` characters."""
        value = self._found(key, default)
        if value is default:
            return default
        if not isinstance(value, str) or len(value) > longest:
            self.refuse(key, f"a text of at most {longest} characters")
        return value

    def flag(self, key: str, default: T = REQUIRED) -> bool | T:
        """True or false."""
        value = self._found(key, default)
        if value is default:
            return default
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def record(self, key: str, *, optional: bool = False) -> Record:
        """An object below this one; an empty one where it is absent and `optional`."""
        value = self._found(key, {} if optional else REQUIRED)
        if not isinstance(value, Mapping):
            self.refuse(key, "an object")
        return Record(self._place(key), value, self.reading)

    def listed(self, key: str, kind: type[T], *, optional: bool = False, most: int = 1_000_000) -> list[T]:
        """A list of values of this type, `most` at most; a truth value is no whole number."""
        value = self._found(key, [] if optional else REQUIRED)
        if not isinstance(value, list) or len(value) > most or not all(_is(inner, kind) for inner in value):
            names = {str: "texts", int: "whole numbers", float: "numbers", dict: "objects", list: "lists"}
            self.refuse(key, f"a list of {names.get(kind, kind.__name__)}, {most} at most")
        return value

    def numbers(self, *, finite: bool = True) -> dict[str, float]:
        """{key: number} of all that stands here, which must be numbers."""
        return {key: self.number(key, finite=finite) for key in self.values}

    def records(self) -> Iterator[tuple[str, Record]]:
        """(key, object) of all that stands here, which must be objects."""
        for key in self.values:
            yield key, self.record(key)

    def refuse(self, key: str, wanted: str) -> NoReturn:
        """Raise: `wanted` is what must stand at `key`."""
        found = self.values.get(key)
        said = "is missing" if found is None else f"is {_shown(found)}"
        self.reading.refuse(self._place(key), f"{said}; it must be {wanted}")

    def _found(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            self.reading.refuse(self._place(key), "is missing")
        return default

    def _place(self, key: str) -> str:
        return f"{self.where}: {printable(key, 80)}" if ": " not in self.where else f"{self.where}.{printable(key, 80)}"


def read_record(path: Path, reading: Reading, *, limit: int = LARGEST_TEXT, finite: bool = True) -> Record:
    """The object that a JSON file holds. Raises `reading.error` naming the file, the place and the cure."""
    return Record(str(path), read_object(path, reading, limit=limit, finite=finite), reading)


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _shown(value: Any) -> str:
    return kind_of(value) if isinstance(value, dict | list) else printable(repr(value), 80)
