"""What an unquoted word of YAML stands for, decided late: text keeps the characters typed, a number is a number.

YAML 1.1 reads `0123` as 83, `yes` as true, `12:30:00` as 45000 and `1e-3` as a text. Here a scalar is first of all its
characters; what it means is asked by who knows the type. The rules are YAML 1.2's core schema (yaml.org/spec/1.2.2,
section 10.3.2), and three that its numbers lack: `1_000`, `0b101`, and a sign or none before every one of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

MISSING_TEXT = "???"  # unquoted, "has no value yet": OmegaConf's sign
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_INTEGER = re.compile(rf"[-+]?{_DIGITS}")
_BASED = re.compile(r"([-+]?)0(?:x([0-9a-fA-F_]+)|o([0-7_]+)|b([01_]+))")
_FLOAT = re.compile(rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")
LONGEST_NUMBER = 400  # characters; Python refuses to read 4301 digits


_SIZE = re.compile(r"\s*([0-9]{0,18}\.?[0-9]{1,18})\s*([A-Za-z]*)\s*")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(text: object) -> int | None:
    """Of "5GB", "500 MB", "2GiB" or a number; None: it spells no size."""
    match = _SIZE.fullmatch(str(text))
    if not match or match[2].upper() not in _UNITS:
        return None
    return int(float(match[1]) * _UNITS[match[2].upper()])


class Plain(str):
    """The characters of an unquoted scalar whose type is not known yet. A quoted one is a `str`."""

    __slots__ = ()


class Literal(str):
    """A text of a file that is data: `${` in it is these characters."""

    __slots__ = ()


def scalar(text: str) -> Any:
    """An unquoted scalar for a place without a type: its value, where that gives the characters back, else `Plain`.

    So `8`, `0.5`, `true` and `hash` are themselves, and nothing is lost of `0123`, `8e-3` or `True`.
    """
    value = meaning(text)
    return value if spelled(value) == text and text != MISSING_TEXT else Plain(text)


def meaning(text: str) -> Any:
    """None, a bool, an int, a float, or the characters themselves."""
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if len(text) > LONGEST_NUMBER:
        return str(text)
    number = number_of(text)
    return str(text) if number is None else number


def number_of(text: str) -> int | float | None:
    """The number that the characters spell, or None."""
    if _INTEGER.fullmatch(text):
        return int(text)
    based = _BASED.fullmatch(text)
    if based:
        sign, *digits = based.groups()
        found = next((d, base) for d, base in zip(digits, (16, 8, 2), strict=True) if d is not None)
        try:
            return int(sign + found[0], found[1])
        except ValueError:  # an underscore at an end
            return None
    if _FLOAT.fullmatch(text):
        return float(text)
    special = _NOT_FINITE.fullmatch(text)
    return float(special[1] + special[2].lower()) if special else None


def spelled(value: Any) -> str:
    """A scalar's characters as they are stored; `meaning` reads them back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if not math.isfinite(value):
            return {"inf": ".inf", "-inf": "-.inf"}.get(repr(value), ".nan")
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text  # YAML 1.1 wants the point
    return str(value)


def settle(tree: Any) -> Any:
    """The tree with every `Plain` replaced by its meaning: for who has no types to ask."""
    if isinstance(tree, Plain):
        return meaning(tree)
    if isinstance(tree, Mapping):
        return {key: settle(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [settle(value) for value in tree]
    return tree


def quoted(value: Any) -> str:
    """A value for a message: as text, in quotes, and never long."""
    text = value if isinstance(value, str) else spelled(settle(value))
    return f"'{text}'" if len(text) <= 80 else f"'{text[:60]}...' ({len(text)} characters)"
