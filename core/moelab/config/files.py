"""YAML files and `key=value` as layers: where they lie, what they build on, and who said what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.config.scalars import Plain, meaning, quoted, scalar, settle
from moelab.config.text import LARGEST_FILE, read_tree
from moelab.errors import ConfigError
from moelab.paths import user_path
from moelab.safe_files import Reading, read_text

_SUFFIXES = (".yaml", ".yml")
_KEY = re.compile(r'(?:"[^"]+"|[^.\[\]"]+)(?:\.(?:"[^"]+"|[^.\[\]"]+)|\[[0-9]+\])*')
_KEY_PIECE = re.compile(r'"([^"]+)"|([^.\[\]"]+)')
_OPENERS = ('"', "'", "[", "{")


@dataclass(frozen=True)
class Layer:
    """One contribution to a config, lowest first: a file's, or an override's."""

    origin: str  # the file's path, or the override as it was typed
    tree: dict[str, Any]
    data: bool = False  # of a folder of weights or results, so nothing of it is run unasked
    folder: Path | None = None  # the file's; None: of an override, or of data


def config_folder() -> Path:
    """The shipped configs: beside the package when installed, at the repository's root in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent.parent / "configs"


def find_config(name: str, near: Path | None = None, section: str = "") -> Path:
    """A config by path, relative to `near`, or by its name among the shipped ones (`train/tiny_moe`).

    Raises ConfigError listing where it looked.
    """
    file = name if name.endswith(_SUFFIXES) else f"{name}.yaml"
    shipped = config_folder()
    places = [near / user_path(file)] if near is not None else [user_path(name), user_path(file)]
    places += [shipped / section / file, shipped / file, shipped / file.removeprefix("configs/")]
    for place in places:
        if is_file(place):
            return place
    looked = ", ".join(dict.fromkeys(str(place) for place in places))
    raise ConfigError(f"{name}: no such config file; looked for {looked}")


def is_file(path: Path) -> bool:
    """Whether a file is there; a text that no file system takes as a name is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than a name may be, or holding a NUL
        return False


def is_override(argument: str) -> bool:
    """Whether a word of the command line is `key=value`, and not the name of a YAML file that holds a `=`."""
    return "=" in argument and not (argument.endswith(_SUFFIXES) and is_file(user_path(argument)))


def file_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[Layer]:
    """The layers of one file: those of its bases first, then its own.

    `base: NAME` at the top lays the file over all of NAME; inside a section it lays that section over the
    same section of NAME.
    """
    resolved = path.resolve()
    if resolved in seen:
        raise ConfigError(f"{path}: `base` goes round in a circle: {' -> '.join(str(p) for p in (*seen, resolved))}")
    tree = read_file(path)
    layers = [layer for key_path, name in _take_bases(tree, ()) for layer in _base(path, key_path, name, seen)]
    return [*layers, Layer(str(path), tree, folder=path.parent.absolute())]


def override_layer(text: str) -> Layer:
    """`key=value` as a layer.

    The value is the characters after the first `=`, whatever they mean in YAML (`#`, `: `); one that opens with a
    quote or a bracket is YAML. Space around key and value doesn't count.
    """
    key, separator, value = text.partition("=")
    key, value = key.strip(), value.strip()
    origin = text if len(text) <= 200 else f"{text[:160]}... ({len(text)} characters)"
    if not separator or not _KEY.fullmatch(key):
        raise ConfigError(f"{origin}: neither a config file nor an override; write a path, or key=value")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{key}: holds bytes that are no UTF-8 text: {ascii(value)[:100]}") from error
    tree: Any = read_tree(value, origin) if value[:1] in _OPENERS else scalar(value)
    for quoted_piece, piece in reversed(_KEY_PIECE.findall(key)):
        tree = {quoted_piece or piece: tree}
    return Layer(origin, tree)


def subtree(tree: Any, key_path: tuple[str, ...], absent: Any = None) -> Any:
    """What stands at `key_path`, or `absent`."""
    for key in key_path:
        if isinstance(tree, list) and key.isdecimal() and int(key) < len(tree):
            tree = tree[int(key)]
        elif isinstance(tree, Mapping) and key in tree:
            tree = tree[key]
        else:
            return absent
    return tree


def _base(path: Path, key_path: tuple[str, ...], name: str, seen: tuple[Path, ...]) -> list[Layer]:
    base = find_config(name, near=path.parent, section="/".join(key_path))
    layers = []
    for layer in file_layers(base, (*seen, path.resolve())):
        part = subtree(layer.tree, key_path)
        if part is None:
            continue
        for key in reversed(key_path):
            part = {key: part}
        layers.append(Layer(layer.origin, part, folder=layer.folder))
    if not layers:
        raise ConfigError(f"{path}: {'.'.join((*key_path, 'base'))}: {base} has no section '{'.'.join(key_path)}'")
    return layers


def _take_bases(tree: dict[str, Any], key_path: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
    """Remove every `base:` that names a file from the tree; -> (where it stood, what it named), outermost first."""
    found = []
    base = tree.get("base")
    if isinstance(base, str) and (not isinstance(base, Plain) or isinstance(meaning(base), str)):  # 1e4 is no name
        found.append((key_path, str(tree.pop("base"))))
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _take_bases(value, (*key_path, str(key)))
    return found


def read_file(path: Path, *, quick: bool = False) -> dict[str, Any]:
    """The tree of a YAML file, a mapping. Raises ConfigError naming the file and the line; `quick` as `read_tree`'s."""
    reading = Reading(ConfigError, "a config is a text file, YAML in UTF-8")
    tree = read_tree(read_text(path, reading, LARGEST_FILE), str(path), quick=quick)
    if settle(tree) is None:
        return {}
    if not isinstance(tree, dict):
        found = "a list" if isinstance(tree, list) else quoted(tree)
        raise ConfigError(f"{path}: must hold a mapping of keys, not {found}")
    return tree
