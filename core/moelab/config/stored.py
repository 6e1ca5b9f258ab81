"""Configs that are data: what a run folder and a checkpoint hold. Written by moelab, read as text.

A stored config says nothing but itself: no `base`, no interpolation. What came from the environment stands there as it
was written, `${oc.env:NAME}`; read back it stays these characters, and nobody looks the variable up.
"""

from __future__ import annotations

import dataclasses
import hmac
import json
import os
from collections.abc import Mapping
from functools import cache
from hashlib import pbkdf2_hmac
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from moelab.config.files import read_file
from moelab.config.interpolation import escape, leaves, replace_leaves, unescape
from moelab.config.overlay import section_schemas
from moelab.config.scalars import MISSING_TEXT, Literal
from moelab.config.text import write_tree
from moelab.config.typed import Typing, default_of

SchemaT = TypeVar("SchemaT")
_NAME = "config.yaml"
_BESIDE = ("state.json", "checkpoints", "metrics.jsonl", "summary.json")  # of a checkpoint, of a run folder
_SALT_BYTES, _ROUNDS = 16, 100_000


def stored(config: Any) -> dict[str, Any]:
    """The config as plain data, with what came from the environment as it was written: what may leave the process."""
    tree = dataclasses.asdict(config)
    return dict(replace_leaves(tree, getattr(config, "as_written", {})))


def to_yaml(config: Any) -> str:
    """The config as YAML that `read_stored` and `load_config` read back."""
    as_written = getattr(config, "as_written", {})
    tree = dataclasses.asdict(config)
    texts = {path: escape(leaf) for path, leaf in leaves(tree) if isinstance(leaf, str) and "${" in leaf}
    return write_tree(replace_leaves(tree, texts | as_written))


def is_stored(path: Path) -> bool:
    """Whether a config file is a run's or a checkpoint's own."""
    return path.name == _NAME and any((path.parent / sign).exists() for sign in _BESIDE)


def read_stored_tree(path: Path) -> dict[str, Any]:
    """The tree of a stored config. Raises ConfigError naming the file."""
    tree = read_file(path, quick=True)
    texts = {key: leaf for key, leaf in leaves(tree) if isinstance(leaf, str) and "${" in leaf}
    return dict(replace_leaves(tree, {key: Literal(unescape(leaf)) for key, leaf in texts.items()}))


def read_stored(path: Path, schema: type[SchemaT]) -> SchemaT:
    """A stored config as its dataclass. Raises ConfigError naming the file or the key.

    A number that came from the environment is the characters `${oc.env:...}`: no checkpoint needs one to be opened.
    """
    return Typing(settled=False, unresolved=True).build(schema, read_stored_tree(path))


def filled(tree: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """A stored tree with the defaults of the keys that it lacks, since there were none when it was stored.

    Nothing in it is checked. The options of parts stay as they are: their defaults are their plugin's
    (`moelab.across_versions`).
    """
    found = dict(tree)
    for field in dataclasses.fields(schema):
        if field.name not in found:
            value = default_of(field)
            if value != MISSING_TEXT:
                found[field.name] = _plain(value)
    for key, (section, items) in schemas_in(schema).items():
        value = found.get(key)
        if section is not None and isinstance(value, Mapping):
            found[key] = filled(value, section)
        elif items is not None and isinstance(value, list):
            found[key] = [filled(one, items) if isinstance(one, Mapping) else one for one in value]
    return found


def _plain(value: Any) -> Any:
    """A default as config.yaml holds it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


@cache
def schemas_in(schema: Any) -> dict[str, tuple[Any, Any]]:
    """{field: the dataclass that it holds, that of which it holds a list} of those that hold one."""
    sections, hints = section_schemas(schema), get_type_hints(schema)
    items = {key: next(iter(get_args(hint)), None) for key, hint in hints.items() if get_origin(hint) is list}
    items = {key: one for key, one in items.items() if dataclasses.is_dataclass(one)}
    return {key: (sections[key], items.get(key)) for key in sections if sections[key] is not None or key in items}


def seal(values: Any, salt: bytes | None = None) -> str:
    """Salted and slow to guess (PBKDF2, RFC 8018): tells whether values are the same again, not what they are."""
    salt = salt or os.urandom(_SALT_BYTES)
    digest = pbkdf2_hmac("sha256", json.dumps(values, sort_keys=True).encode(), salt, _ROUNDS)
    return salt.hex() + digest.hex()


def is_sealed(values: Any, sealed: str) -> bool:
    """Whether `sealed` was made of the same values."""
    salt = bytes.fromhex(sealed[: 2 * _SALT_BYTES])
    return hmac.compare_digest(seal(values, salt), sealed)
