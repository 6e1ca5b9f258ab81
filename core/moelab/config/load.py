"""Config files and overrides -> a checked dataclass. Every complaint names the key and who said it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from moelab.config.files import Layer, file_layers, find_config, is_override, override_layer, subtree
from moelab.config.interpolation import KeyPath, resolve
from moelab.config.overlay import overlay, section_schemas
from moelab.config.stored import is_stored, read_stored_tree
from moelab.config.typed import SCHEMA
from moelab.errors import ConfigError, near

SchemaT = TypeVar("SchemaT")


@dataclass(frozen=True)
class Loaded(Generic[SchemaT]):
    """A config, and what is needed to explain it."""

    config: SchemaT
    layers: list[Layer]
    search_path: list[Path]  # folders of the config files: where their own plugins lie

    def blame(self, error: ConfigError) -> ConfigError:
        """The same complaint with the file or override that set the key it begins with."""
        return _blame(error, self.layers)


def load_config(arguments: Sequence[str], schema: type[SchemaT], *, below: Path | None = None) -> Loaded[SchemaT]:
    """Files (left to right, each over its `base`), then `key=value` overrides -> an instance of `schema`.

    `below` is a stored config that lies under all of them; it is data, so nothing in it is resolved.
    Raises ConfigError for an unknown key, a wrong type, a missing value, or what `schema.check()` refuses.
    """
    paths = [find_config(argument) for argument in arguments if not is_override(argument)]
    given = [layer for path in paths for layer in _layers_of(path)]
    given += [override_layer(argument) for argument in arguments if is_override(argument)]
    layers = [*([Layer(str(below), read_stored_tree(below))] if below else []), *given]
    merged: dict[str, Any] = {}
    for layer in layers:
        _check_keys(layer.tree, schema, (), layer.origin)
        merged = overlay(merged, layer.tree, schema)
    try:
        merged, outside = resolve(merged, _defaults(schema, merged))
        config = to_schema(merged, schema)
        _remember(config, merged, outside)
        check = getattr(config, "check", None)
        if check is not None:
            check()
    except ConfigError as error:
        raise _blame(error, layers) from error
    folders = [path.parent for path in ([below] if below else []) + paths]
    return Loaded(config, layers, list(dict.fromkeys(folders)))


def to_schema(tree: dict[str, Any], schema: type[SchemaT]) -> SchemaT:
    """A plain mapping -> an instance of `schema`, every type checked. Raises ConfigError naming the key."""
    return SCHEMA.build(schema, tree)


def _layers_of(path: Path) -> list[Layer]:
    return [Layer(str(path), read_stored_tree(path))] if is_stored(path) else file_layers(path)


def _defaults(schema: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """The tree over the schema's defaults: what an interpolation may name."""
    return dict(overlay(dataclasses.asdict(schema()), tree, schema))


def _remember(config: Any, tree: dict[str, Any], outside: dict[KeyPath, str]) -> None:
    """Keep the expressions that are stored in place of their values; refuse those a reader of the folder would need."""
    sections = getattr(config, "STORED_AS_WRITTEN", None)
    if sections is None or config.store_environment:
        return
    for key_path, expression in outside.items():
        if key_path[0] not in sections or isinstance(subtree(tree, key_path), dict | list):
            raise ConfigError(
                f"{'.'.join(key_path)}: {expression} would have to be stored as what it stands for, since what is made "
                "here can't be opened without it; set store_environment=true to allow that, or write the value"
            )
    config.as_written = dict(outside)


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
            if subtree(layer.tree, key_path[:depth], _blame) is not _blame:  # null is said by someone, too
                return ConfigError(f"{message} (set by {layer.origin})")
    return error
