"""Patterns over the names of parameters, as the config writes them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from moelab.errors import ConfigError


def matching(names: Iterable[str], pattern: str, key: str) -> set[str]:
    """The names that a pattern (`*.router.*`, `layers.0.*`) matches. Raises ConfigError, naming the key, for none."""
    known = list(names)
    found = {name for name in known if fnmatchcase(name, pattern)}
    if not found:
        nearest = get_close_matches(pattern, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{key}: '{pattern}' matches no parameter of this model; the nearest name is '{nearest}'")
    return found
