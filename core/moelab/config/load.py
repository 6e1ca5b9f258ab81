"""Config files and overrides -> a checked dataclass. Every complaint names the key and who said it."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from moelab.config.files import Layer, file_layers, find_config, override_layer, subtree
from moelab.config.overlay import overlay, section_schemas
from moelab.errors import ConfigError, near

SchemaT = TypeVar("SchemaT")


@dataclass(frozen=True)
class Loaded(Generic[SchemaT]):
    """A config, and what is needed to explain it."""

    config: SchemaT
    layers: list[Layer]
    search_path: list[Path]  # folders of the config files: where their own plugins lie
    below: Layer | None = None  # the lowest of the layers, if it is a checkpoint's

    def blame(self, error: ConfigError) -> ConfigError:
        """The same complaint with the file or override that set the key it begins with."""
        return _blame(error, self.layers)


def load_config(
    arguments: Sequence[str],
    schema: type[SchemaT],
    below: Callable[[Mapping[str, Any]], Layer | None] | None = None,
) -> Loaded[SchemaT]:
    """Files (left to right, each over its `base`), then `key=value` overrides -> an instance of `schema`.

    `below` sees all that these say and may name a layer that lies below them: what a checkpoint says of itself.
    Raises ConfigError for an unknown key, a wrong type, a missing value, or what `schema.check()` refuses.
    """
    files = [a for a in arguments if "=" not in a or Path(a).is_file()]
    overrides = [a for a in arguments if a not in files]
    paths = [find_config(name) for name in files]
    layers = [layer for path in paths for layer in file_layers(path)] + [override_layer(text) for text in overrides]
    merged = _merge(layers, schema)
    lowest = below(merged) if below is not None else None
    if lowest is not None:
        layers.insert(0, lowest)
        merged = _merge(layers, schema)
    try:
        config = to_schema(merged, schema)
        check = getattr(config, "check", None)
        if check is not None:
            check()
    except ConfigError as error:
        raise _blame(error, layers) from error
    return Loaded(config, layers, list(dict.fromkeys(path.parent for path in paths)), lowest)


def _merge(layers: Sequence[Layer], schema: Any) -> dict[str, Any]:
    """The layers, lowest first, as one tree. Raises ConfigError for a key that `schema` does not have."""
    merged: dict[str, Any] = {}
    for layer in layers:
        _check_keys(layer.tree, schema, (), layer.origin)
        merged = overlay(merged, layer.tree, schema)
    return merged


def to_schema(tree: dict[str, Any], schema: type[SchemaT]) -> SchemaT:
    """A plain mapping -> an instance of `schema`, types checked by OmegaConf."""
    try:
        typed = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(tree))
        return typing.cast(SchemaT, OmegaConf.to_object(typed))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: has no value yet; set it in a file or as {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        key = error.full_key or "config"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error


def to_yaml(config: Any) -> str:
    """The config as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def _check_keys(tree: Any, schema: Any, key_path: tuple[str, ...], origin: str) -> None:
    """Refuse keys that the dataclass does not have, at any depth; parts (`dict[str, Any]`) are the registry's."""
    legal = section_schemas(schema)
    if not legal or not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if key not in legal:
            where = ".".join((*key_path, str(key)))
            raise ConfigError(
                f"{where}: no such key{near(key, legal)} Here belong: {', '.join(legal)} (set by {origin})"
            )
        _check_keys(value, legal[key], (*key_path, str(key)), origin)


def _blame(error: ConfigError, layers: list[Layer]) -> ConfigError:
    message = str(error)
    if "(set by " in message or "has no value yet" in message:
        return error
    key_path = tuple(message.split(":", maxsplit=1)[0].replace('"', "").split("."))
    for depth in range(len(key_path), 0, -1):
        for layer in reversed(layers):
            if subtree(layer.tree, key_path[:depth]) is not None:
                return ConfigError(f"{message} (set by {layer.origin})")
    return error
