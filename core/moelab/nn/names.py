"""Patterns over the names of parameters, as the config writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from moelab.errors import ConfigError


def matching(names: Iterable[str], pattern: str, key: str) -> set[str]:
    """The names that a pattern (`*.router.*`, `layers.0.*`) matches. Raises ConfigError, naming the key, for none."""
    known = list(names)
    found = {name for name in known if fnmatchcase(name, pattern)}
    if not found:
        nearest = get_close_matches(pattern, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{key}: '{pattern}' matches no parameter of this model; the nearest name is '{nearest}'")
    return found


def stop_training(model: nn.Module, patterns: Sequence[str], key: str) -> set[str]:
    """Parameters whose name matches a pattern get no gradient from now on; -> their names. A tied matrix has both.

    Raises ConfigError, naming the key, for a pattern that matches nothing, and where nothing would be left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    frozen = {name for pattern in patterns for name in matching(named, pattern, key)}
    for name in frozen:
        named[name].requires_grad_(False)
    if frozen and not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigError(f"{key}: {list(patterns)} match every parameter, so nothing would be trained")
    return frozen
