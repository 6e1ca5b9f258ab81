"""Config files and overrides -> a checked dataclass. Every complaint names the key and who said it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from moelab.config.files import Layer, file_layers, find_config, is_override, override_layer, subtree
from moelab.config.interpolation import KeyPath, leaves, resolve
from moelab.config.overlay import overlay, section_schemas
from moelab.config.scalars import settle
from moelab.config.stored import is_stored, read_stored_tree
from moelab.config.typed import SCHEMA
from moelab.errors import ConfigError, near
from moelab.paths import Places

SchemaT = TypeVar("SchemaT")


@runtime_checkable
class HasPlaces(Protocol):
    """A schema that keeps where what it names is looked for."""

    SEARCHED: ClassVar[tuple[str, ...]]  # sections
    search_path: list[str]
    said_in: dict[str, dict[str, Path]]


@dataclass(frozen=True)
class Loaded(Generic[SchemaT]):
    """A config, and what is needed to explain it."""

    config: SchemaT
    layers: list[Layer]
    below: Layer | None = None  # the lowest of the layers, if it is a checkpoint's

    @property
    def search_path(self) -> list[Path]:
        """Folders of the config files, their bases' included; whose text counts most comes first."""
        return list(dict.fromkeys(layer.folder for layer in reversed(self.layers) if layer.folder is not None))

    def places(self, section: str) -> Places:
        """Where what `section` names is looked for: plugins, data."""
        return Places(said_in(self.layers, section), tuple(self.search_path))

    def blame(self, error: ConfigError) -> ConfigError:
        """The same complaint with the file or override that set the key it begins with."""
        return _blame(error, self.layers)


def load_config(
    arguments: Sequence[str],
    schema: type[SchemaT],
    *,
    below: Callable[[Mapping[str, Any]], Layer | None] | None = None,
    trust: bool = False,
) -> Loaded[SchemaT]:
    """Files (left to right, each over its `base`), then `key=value` overrides -> an instance of `schema`.

    `below` sees what these say and may answer with a layer that lies under them all: what a checkpoint says of
    itself. That is data, so texts in it are `Literal` and nothing is resolved; nor are plugins that only data names
    taken up, unless `trust`.
    Raises ConfigError for an unknown key, a wrong type, a missing value, or what `schema.check()` refuses.
    """
    layers = read_layers(arguments)
    merged = merge_layers(layers, schema)
    lowest = below(_readable(merged, schema)) if below is not None else None
    if lowest is not None:
        layers.insert(0, lowest)
        merged = merge_layers(layers, schema)
    if not trust:
        _refuse_plugins_of_data(layers)
    try:
        merged, outside = resolve(merged, _defaults(schema, merged))
        config = to_schema(merged, schema)
        _remember(config, merged, outside)
        check = getattr(config, "check", None)
        if check is not None:
            check()
    except ConfigError as error:
        raise _blame(error, layers) from error
    loaded = Loaded(config, layers, lowest)
    if isinstance(config, HasPlaces):
        config.said_in = {section: said_in(layers, section) for section in config.SEARCHED}
        config.search_path = _for_good(config, loaded.search_path)
    return loaded


def _for_good(config: HasPlaces, folders: Sequence[Path]) -> list[str]:
    """`search_path` as it is stored, for who opens the run later and elsewhere: all places, first those of the data."""
    here = Path.cwd()
    files = [str(folder) for folder in reversed(config.said_in.get("data", {}).values()) if folder != here]
    return list(dict.fromkeys([*files, *config.search_path, *map(str, folders), str(here)]))


def said_in(layers: Sequence[Layer], section: str) -> dict[str, Path]:
    """{text of a value in this section: the folder of the last file that says it}; the current one, where typed.

    What data says has no folder of its own.
    """
    found: dict[str, Path] = {}
    for layer in layers:
        for _, leaf in leaves({section: layer.tree.get(section)}):
            if isinstance(leaf, str):
                found.pop(str(leaf), None)  # said again: in the order of the last word
                found |= {} if layer.data else {str(leaf): layer.folder or Path.cwd()}
    return found


def read_layers(arguments: Sequence[str]) -> list[Layer]:
    """What files and overrides say, lowest first."""
    paths = [find_config(argument) for argument in arguments if not is_override(argument)]
    layers = [layer for path in paths for layer in _layers_of(path)]
    return layers + [override_layer(argument) for argument in arguments if is_override(argument)]


def merge_layers(layers: Sequence[Layer], schema: Any) -> dict[str, Any]:
    """The layers, lowest first, as one tree. Raises ConfigError for a key that `schema` does not have."""
    merged: dict[str, Any] = {}
    for layer in layers:
        _check_keys(layer.tree, schema, (), layer.origin)
        merged = overlay(merged, layer.tree, schema)
    return merged


def _readable(merged: dict[str, Any], schema: Any) -> dict[str, Any]:
    """What the layers say, resolved as far as that goes without what is still to be laid below them."""
    with contextlib.suppress(
        ConfigError
    ):  # of what the lowest layer may have; else it is said when all layers are there
        merged, _ = resolve(merged, _defaults(schema, merged))
    return dict(settle(merged))


def to_schema(tree: dict[str, Any], schema: type[SchemaT]) -> SchemaT:
    """A plain mapping -> an instance of `schema`, every type checked. Raises ConfigError naming the key."""
    return SCHEMA.build(schema, tree)


def _refuse_plugins_of_data(layers: Sequence[Layer]) -> None:
    """Code that a folder's config names runs if the user names it too."""
    naming = [layer for layer in layers if "plugins" in layer.tree]
    if naming and naming[-1].data and naming[-1].tree["plugins"]:
        names = ", ".join(map(str, naming[-1].tree["plugins"]))
        raise ConfigError(
            f"plugins: {naming[-1].origin} names {names}, and code that a folder names is not run unasked. If they are "
            f"yours, name them: plugins=[{names}]; if you have read and trust them, give --trust-plugins"
        )


def _layers_of(path: Path) -> list[Layer]:
    return [Layer(str(path), read_stored_tree(path), data=True)] if is_stored(path) else file_layers(path)


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
