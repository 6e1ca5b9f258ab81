"""YAML files as layers: where they lie, what they build on, and who said what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moelab.errors import ConfigError


@dataclass(frozen=True)
class Layer:
    """One contribution to a config, lowest first: a file's, or an override's."""

    origin: str  # the file's path, or the override as it was typed
    tree: dict[str, Any]


def config_folder() -> Path:
    """The shipped configs: beside the package when installed, at the repository's root in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent.parent / "configs"


def find_config(name: str, near: Path | None = None, section: str = "") -> Path:
    """A config by path, relative to `near`, or by its name among the shipped ones (`train/tiny_moe`).

    Raises ConfigError listing where it looked.
    """
    file = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    shipped = config_folder()
    places = [near / file] if near is not None else [Path(name), Path(file)]
    places += [shipped / section / file, shipped / file, shipped / file.removeprefix("configs/")]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(dict.fromkeys(str(place) for place in places))
    raise ConfigError(f"{name}: no such config file; looked for {looked}")


def file_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[Layer]:
    """The layers of one file: those of its bases first, then its own.

    `base: NAME` at the top lays the file over all of NAME; inside a section it lays that section over the
    same section of NAME.
    """
    resolved = path.resolve()
    if resolved in seen:
        raise ConfigError(f"{path}: `base` goes round in a circle: {' -> '.join(str(p) for p in (*seen, resolved))}")
    tree = _read(path)
    layers = [layer for key_path, name in _take_bases(tree, ()) for layer in _base(path, key_path, name, seen)]
    return [*layers, Layer(str(path), tree)]


def override_layer(text: str) -> Layer:
    """`key=value` as a layer; the value is YAML."""
    key, separator, _ = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"{text}: neither a config file nor an override; write a path, or key=value")
    try:
        tree = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{text}: can't read this override: {str(error).splitlines()[0]}") from error
    assert isinstance(tree, dict), tree
    return Layer(text, {str(k): v for k, v in tree.items()})


def subtree(tree: Any, key_path: tuple[str, ...]) -> Any:
    """What stands at `key_path`, or None."""
    for key in key_path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
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
        layers.append(Layer(layer.origin, part))
    if not layers:
        raise ConfigError(f"{path}: {'.'.join((*key_path, 'base'))}: {base} has no section '{'.'.join(key_path)}'")
    return layers


def _take_bases(tree: dict[str, Any], key_path: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
    """Remove every `base:` from the tree; -> (where it stood, what it named), outermost first."""
    found = []
    if isinstance(tree.get("base"), str):
        found.append((key_path, tree.pop("base")))
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _take_bases(value, (*key_path, str(key)))
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
        tree = OmegaConf.to_container(loaded)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file; a config is YAML in UTF-8") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise ConfigError(f"{path}: can't be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys, not a {type(tree).__name__}")
    return {str(key): value for key, value in tree.items()}
