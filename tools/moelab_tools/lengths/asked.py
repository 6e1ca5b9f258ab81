"""What `--length`, `--ways` and their like ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moelab.config.text import read_tree
from moelab.errors import ConfigError, near
from moelab.paths import user_path
from moelab.safe_files import Reading, read_text
from moelab_tools.positions import Positions

PARTS = ("attention", "rope_scaling")  # of a way
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*(?:_[A-Za-z0-9.+-]+)*")  # of a way: it becomes a folder's
ALL = "all"  # `--ways`: KNOWN
# Left out: the trained length (window, original_max_position_embeddings), or how often a text has it (factor).
KNOWN: dict[str, dict[str, Any]] = {
    "window": {
        "attention": "sliding_window"
    },  # the control: the last trained length of tokens, and nothing before them
    "plain": {},
    "linear": {"rope_scaling": "linear"},
    "dynamic_ntk": {"rope_scaling": {"name": "dynamic", "factor": 1}},  # the longest wavelength grows as the text does
    "yarn_static": {
        "rope_scaling": {"name": "yarn", "factor": 8}
    },  # one factor for all lengths, as a served model has it
    "yarn_dynamic": {"rope_scaling": "yarn"},
    "dca": {"attention": "dual_chunk"},
    "dca_temperature": {"attention": {"name": "dual_chunk", "temperature": "per_query"}},
}
AS_IT_IS = "as_trained"  # the way that leaves the model what it is
_LENGTH = re.compile(r"([0-9]*\.?[0-9]+)(x?)")


@dataclass(frozen=True)
class Way:
    """An attention and a rope scaling, under the name that tables and figures give them."""

    name: str
    positions: Positions
    optional: bool = False  # one of ALL, which is left out where a model can't take it


def parse_lengths(text: str, trained: int) -> list[int]:
    """ "1x,2x,512" -> tokens. Raises ConfigError for what is none."""
    found = []
    for piece in text.split(","):
        match = _LENGTH.fullmatch(piece.strip())
        length = 0 if match is None else round(float(match[1]) * (trained if match[2] else 1))
        if length < 1:
            raise ConfigError(f"--length: '{piece}' is no length; write 1x,2x,4x of the trained one, or tokens: 512")
        found.append(length)
    return found


def way_of(positions: Positions) -> Way:
    """The one that `--attention` and `--rope-scaling` say, named after them."""
    parts = [one for one in (positions.rope_scaling, positions.attention) if one is not None]
    said = [re.sub(r"[^A-Za-z0-9._]+", "-", one) for one in parts]
    return Way("+".join(one.strip("-._") for one in said) or AS_IT_IS, positions)


def read_ways(said: str) -> list[Way]:
    """KNOWN for `all`, else those of a YAML file {NAME: {attention: PART, rope_scaling: PART}}.

    Raises ConfigError naming what is wrong.
    """
    if said == ALL:
        return [replace(way, optional=True) for way in ways_of(KNOWN, "")]
    path = user_path(said, "--ways")
    tree = read_tree(read_text(path, Reading(ConfigError, f"name a file of ways, or {ALL}, with --ways")), str(path))
    if not isinstance(tree, Mapping) or not tree:
        raise ConfigError(f"{path}: must hold ways by name: {{yarn: {{rope_scaling: yarn}}, plain: {{}}}}")
    return ways_of(tree, f"{path}: ")


def ways_of(tree: Mapping[str, Any], where: str) -> list[Way]:
    """{name: {attention: PART, rope_scaling: PART}} -> ways; a part is a name, or {name: ..., options}."""
    found = []
    for name, parts in tree.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(f"{where}{name}: a way's name is of letters, digits, . + - and single _ between them")
        if not isinstance(parts, Mapping):
            raise ConfigError(f"{where}{name}: must be {{attention: ..., rope_scaling: ...}}, or {{}}, not {parts!r}")
        for key in parts:
            if key not in PARTS:
                raise ConfigError(f"{where}{name}.{key}: unknown{near(str(key), PARTS)} Known: {', '.join(PARTS)}")
        said = {part: _text(parts.get(part), f"{where}{name}.{part}") for part in PARTS}
        found.append(Way(name, Positions(**said, typed=False)))
    return found


def _text(part: Any, where: str) -> str | None:
    """As the options of a command spell it."""
    if part is None or isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ConfigError(f"{where}: must be a name, or {{name: ..., options}}, not {part!r}")
    return json.dumps(part)
