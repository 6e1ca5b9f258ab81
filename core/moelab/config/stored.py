"""Configs that are data: what a run folder and a checkpoint hold. Written by moelab, read as text.

A stored config says nothing but itself: no `base`, no interpolation. What came from the environment stands there as it
was written, `${oc.env:NAME}`; read back it stays these characters, and nobody looks the variable up.
"""

from __future__ import annotations

import dataclasses
import hmac
import json
import os
from hashlib import pbkdf2_hmac
from pathlib import Path
from typing import Any, TypeVar

from moelab.config.files import read_file
from moelab.config.interpolation import escape, leaves, replace_leaves, unescape
from moelab.config.scalars import Literal
from moelab.config.text import write_tree
from moelab.config.typed import Typing

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


def seal(values: Any, salt: bytes | None = None) -> str:
    """Salted and slow to guess (PBKDF2, RFC 8018): tells whether values are the same again, not what they are."""
    salt = salt or os.urandom(_SALT_BYTES)
    digest = pbkdf2_hmac("sha256", json.dumps(values, sort_keys=True).encode(), salt, _ROUNDS)
    return salt.hex() + digest.hex()


def is_sealed(values: Any, sealed: str) -> bool:
    """Whether `sealed` was made of the same values."""
    salt = bytes.fromhex(sealed[: 2 * _SALT_BYTES])
    return hmac.compare_digest(seal(values, salt), sealed)
