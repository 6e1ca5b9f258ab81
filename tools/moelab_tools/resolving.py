"""What configs and overrides come to, as YAML with who said what: only what is set, or all that a run would store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from moelab.config.files import is_override
from moelab.config.load import load_config, merge_layers, read_layers
from moelab.config.provenance import annotated, origins, short_origin
from moelab.config.run import RunConfig
from moelab.config.stored import to_yaml
from moelab.config.text import write_tree
from moelab.config.upcycle import UpcycleConfig
from moelab.errors import ConfigError
from moelab.paths import user_path


def said_text(arguments: Sequence[str]) -> str:
    """What files and overrides set, merged. Torch is not needed, and nothing has to be complete."""
    folders = [argument for argument in arguments if not is_override(argument) and user_path(argument).is_dir()]
    if folders:
        raise ConfigError(f"{folders[0]}: is a folder, whose config says all of it; give --resolved")
    layers = read_layers(arguments)
    schema = _schema_of(arguments)
    return annotated(write_tree(merge_layers(layers, schema)), origins(layers, schema))


def resolved_text(arguments: Sequence[str], *, trust: bool = False) -> str:
    """The whole config with every default, as `moelab train` stores it. A FOLDER's own config lies below the others.

    Raises ConfigError for what a run would refuse before it looks at its data.
    """
    from moelab.registry import Registry
    from moelab.training.setup import resolve_run
    from moelab_tools.checkpoints import load_run, plugin_places

    if _schema_of(arguments) is UpcycleConfig:
        return _resolved_upcycle(arguments)
    loaded = load_run(arguments, trust=trust)
    run = loaded.config
    registry = Registry(run.plugins, run.entry_points, plugin_places(loaded, trust=trust))
    try:
        resolve_run(run, registry)
    except ConfigError as error:
        raise loaded.blame(error) from error
    folders = [layer.origin for layer in loaded.layers if layer.data]
    head = f"# without a comment: as in {short_origin(folders[0])}, else a default\n" if folders else ""
    return head + annotated(to_yaml(run), origins(loaded.layers, RunConfig))


def _resolved_upcycle(arguments: Sequence[str]) -> str:
    """With the options of its initialisers; what the source decides of `model` is not said."""
    from moelab.hookspecs import EXTENSION_POINTS
    from moelab.registry import Registry

    loaded = load_config(arguments, UpcycleConfig)
    config = loaded.config
    points = [point for point in EXTENSION_POINTS if point.key.startswith("recipe.")]
    registry = Registry(config.plugins, config.entry_points, loaded.places("plugins"), points=points)
    for point in points:
        axis = point.key.removeprefix("recipe.")
        try:
            setattr(config.recipe, axis, registry.resolve(point, getattr(config.recipe, axis), point.key))
        except ConfigError as error:
            raise loaded.blame(error) from error
    return annotated(to_yaml(config), origins(loaded.layers, UpcycleConfig))


def _schema_of(arguments: Sequence[str]) -> type:
    """Which command's config this is: one that names a key that only upcycling has is upcycling's."""
    files = [a for a in arguments if is_override(a) or not user_path(a).is_dir()]
    own = {field.name for field in fields(UpcycleConfig)} - {field.name for field in fields(RunConfig)}
    layers = read_layers(files)
    return UpcycleConfig if any(own & layer.tree.keys() for layer in layers) else RunConfig
