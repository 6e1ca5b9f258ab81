"""Which of the records, and in which order: conditions and sort keys over a record's fields and its config."""

from __future__ import annotations

import fnmatch
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from moelab.config.files import subtree
from moelab.config.interpolation import leaves
from moelab.config.scalars import meaning, spelled
from moelab.errors import ConfigError, near
from moelab.run_table.record import RunRecord

_CONDITION = re.compile(r"\s*([^=<>!\s]+)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", re.DOTALL)
_ORDERED: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_FIELDS = tuple(f.name for f in fields(RunRecord) if f.name not in ("config", "alarms"))


@dataclass(frozen=True)
class Condition:
    """`key=value`, `key!=value`, `key<value` and so on; a text may hold `*`."""

    key: str
    sign: str
    value: str

    @classmethod
    def of(cls, text: str) -> Condition:
        """Raises ConfigError for a text that is no condition."""
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise ConfigError(f"--where: '{text}' is no condition; write KEY=VALUE, or one of != < <= > >= for the =")
        return cls(*match.groups())

    def holds(self, value: Any) -> bool:
        """Whether it holds of a value that was found; what a run lacks is unequal to everything."""
        if isinstance(value, dict) and "name" in value:
            value = value["name"]  # a part
        wanted = meaning(self.value)
        if self.sign in _ORDERED:
            both = _is_number(value) and _is_number(wanted)
            return both and _ORDERED[self.sign](value, wanted)
        if _is_number(value) and _is_number(wanted):
            equal = value == wanted
        else:
            text = value if isinstance(value, str) else str(value) if value is MISSING else _text(value)
            equal = value is not MISSING and fnmatch.fnmatchcase(text, self.value)
        return equal if self.sign == "=" else not equal


MISSING: Any = object()  # what a run has at a key that its config lacks


def select(records: Sequence[RunRecord], conditions: Sequence[str]) -> list[RunRecord]:
    """The records of which every condition holds. Raises ConfigError for a key that none of them has."""
    asked = [Condition.of(text) for text in conditions]
    looks = [find_key(records, condition.key, "--where") for condition in asked]
    return [r for r in records if all(c.holds(look(r)) for c, look in zip(asked, looks, strict=True))]


def sort(records: Sequence[RunRecord], key: str, *, reverse: bool = False) -> list[RunRecord]:
    """By a field or a key of the config; numbers before texts, and what has no value comes last either way."""
    look = find_key(records, key, "--sort")
    having = [r for r in records if _rank(look(r)) is not None]
    without = [r for r in records if _rank(look(r)) is None]
    return sorted(having, key=lambda r: _rank(look(r)) or (), reverse=reverse) + without


def find_key(records: Sequence[RunRecord], key: str, option: str) -> Callable[[RunRecord], Any]:
    """What reads `key` off a record: a field, a key of the config, or the last words of one, if only one ends so.

    Raises ConfigError for a key that nothing has, or that more than one could be.
    """
    if key == "age":
        return lambda record: -record.updated
    if key == "alarms":
        return lambda record: len(record.alarms)
    if key in _FIELDS:
        return lambda record: str(record.path) if key == "path" else getattr(record, key)
    known = {".".join(path[:n]): n for r in records for path, _ in leaves(r.config) for n in range(1, len(path) + 1)}
    ends = [key] if key in known else [name for name in known if name.endswith(f".{key}")]
    found = [name for name in ends if known[name] == min(known[end] for end in ends)]  # not those of single layers
    if len(found) > 1:
        raise ConfigError(f"{option}: '{key}' may mean {', '.join(found[:6])}; write one of them")
    if not found:
        if not records:
            return lambda record: MISSING
        raise ConfigError(
            f"{option}: no run here has a key '{key}'{near(key, [*_FIELDS, 'age', *known])} Fields: "
            f"{', '.join((*_FIELDS, 'age', 'alarms'))}; or a key of the config"
        )
    path = tuple(found[0].split("."))
    return lambda record: subtree(record.config, path, MISSING)


def _rank(value: Any) -> tuple[int, Any] | None:
    if isinstance(value, dict) and "name" in value:
        value = value["name"]
    if value is None or value is MISSING or (isinstance(value, float) and math.isnan(value)):
        return None
    return (0, value) if _is_number(value) else (1, _text(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value) if isinstance(value, list | dict) else spelled(value)
