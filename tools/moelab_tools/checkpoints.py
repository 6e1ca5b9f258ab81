"""What the commands ask of a checkpoint folder beside its model, and how they lay a config over one."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from moelab import launcher
from moelab.checkpoint import CONFIG, is_moelab, read_run_config
from moelab.config.files import Layer, find_config, is_override
from moelab.config.load import Loaded, load_config, read_layers
from moelab.config.overlay import overlay
from moelab.config.run import RunConfig, TrainConfig
from moelab.config.stored import read_stored_tree
from moelab.data.tokenizer import Tokenizer, load_tokenizer
from moelab.errors import CheckpointError, ConfigError
from moelab.integrity import Verify
from moelab.origin import Origin, origin_layer, origin_of, read_origin
from moelab.paths import Places, user_path
from moelab.registry import Registry
from moelab.training.setup import resolve_run
from moelab.training.start import differences, refuse_others
from moelab_tools.terminal import wrapped


def tokenizer_of(path: Path, given: str | None) -> Tokenizer:
    """The tokenizer asked for, or the one stored in the checkpoint."""
    if given is not None:
        return load_tokenizer(given)
    origin = read_origin(path)
    own = origin.own_tokenizer()
    if own is None:
        raise CheckpointError(
            f"{origin.folder}: holds no tokenizer.json; name one with --tokenizer, or use --tokenizer bytes"
        )
    return own


def load_run(
    arguments: Sequence[str], needed: Sequence[str] = (), *, trust: bool = False, verify: Verify = True
) -> Loaded[RunConfig]:
    """Config files, overrides and at most one checkpoint folder, whose own config then lies below them all.

    `needed`: overrides that stand for what a run must have and a command does not look at.
    """
    folders = [a for a in arguments if not is_override(a) and user_path(a).is_dir()]
    if len(folders) > 1:
        raise ConfigError(f"{folders[1]}: one checkpoint at a time, and {folders[0]} is one already")
    rest = [a for a in arguments if a not in folders]
    for name in (a for a in rest if not is_override(a)):
        try:
            find_config(name)
        except ConfigError as error:
            raise ConfigError(f"{error}; nor is there a folder {name}, whose checkpoint could be meant") from error
    own = [own_layer(read_origin(folder)) for folder in folders]
    if needed and any(
        layer.tree.get("stages") for layer in (*own, *read_layers(rest))
    ):  # which say how many steps there are
        needed = [one for one in needed if not one.startswith("train.steps=")]
    if not folders:
        return load_config([*rest, *needed], RunConfig, below=partial(_lowest, verify=verify), trust=trust)
    return load_config([*rest, *needed], RunConfig, below=lambda config: own[-1], trust=trust)


def _lowest(said: Mapping[str, Any], *, verify: Verify) -> Layer | None:
    """What lies below a config, as its command will have it."""
    if not said.get("alignment"):
        return origin_layer(said, verify=verify)
    from moelab.alignment.run import lowest_layer

    return lowest_layer(said, verify=verify)


def own_layer(origin: Origin) -> Layer:
    """All that a folder says: its model and tokenizer, and of a moelab checkpoint the config of its run."""
    layer = origin.layer()
    if not is_moelab(origin.folder):  # which has no run, and so no length of its own
        length = min(TrainConfig.sequence_length, origin.model.max_position_embeddings)
        return Layer(layer.origin, layer.tree | {"train": {"sequence_length": length}}, data=True)
    tree = overlay(read_stored_tree(origin.folder / CONFIG), layer.tree, RunConfig)
    return Layer(layer.origin, tree, data=True)


def evaluation_config(path: Path, arguments: tuple[str, ...], *, trust: bool = False) -> tuple[RunConfig, Registry]:
    """What to evaluate on, and with which plugins: the data of its own run, or those of the given files and overrides.

    Model and tokenizer are the checkpoint's. Raises ConfigError where the arguments say another one and
    `train.init_overrides` doesn't name it.
    """
    origin = read_origin(path)
    own = is_moelab(origin.folder) and all(map(is_override, arguments))
    if not own and not arguments:
        raise CheckpointError(f"{path}: says nothing of its data; name a config, as in configs/train/tiny_moe.yaml")
    layer = own_layer(origin) if own else origin.layer()
    if own:  # its config stands as in the stage that made it, which may not be the run's last
        layer = Layer(layer.origin, layer.tree | {"stages": []}, data=True)
    needed = () if own else ("run_dir=unused",)
    loaded = load_config([*arguments, *needed], RunConfig, below=lambda config: layer, trust=trust)
    run = loaded.config
    registry = Registry(run.plugins, run.entry_points, plugin_places(loaded, trust=trust))
    try:
        _check_origin(run, origin, registry)
    except ConfigError as error:
        raise loaded.blame(error) from error
    tell_origin(loaded)
    if origin.tokenizer is None:
        click.echo(f"{origin.folder}: holds no tokenizer.json: whether it knows these ids can't be told", err=True)
    run.model = origin.model
    return run, registry


def plugin_places(loaded: Loaded[RunConfig], *, trust: bool = False) -> Places:
    """Where the modules that a config names are looked for; what data says of places counts with `trust` alone."""
    saying = [layer for layer in loaded.layers if "search_path" in layer.tree]
    from_data = bool(saying) and saying[-1].data
    return loaded.places("plugins") if from_data and not trust else loaded.config.places("plugins")


def take_up_plugins(run: RunConfig, *, verify: Verify = True) -> None:
    """Name in a run's config what the checkpoint that it starts from names, with the places where that was found."""
    origin = origin_of(asdict(run), verify=verify)
    if origin is None or not origin.is_run:
        return
    stored = read_run_config(origin.folder)
    run.plugins = list(dict.fromkeys([*run.plugins, *stored.plugins]))
    run.search_path = list(dict.fromkeys([*run.search_path, *stored.search_path]))


def _check_origin(run: RunConfig, origin: Origin, registry: Registry) -> None:
    said = copy.deepcopy(run)
    resolve_run(said, registry)
    found = list(differences(said, origin, registry, load_tokenizer(said.data.tokenizer)))
    refuse_others(found, origin, said.train.init_overrides)


def tell_stage(run: RunConfig) -> None:
    """Say on stderr which stage's figures are shown, of a run in stages."""
    if run.stages:
        told = f"stages: what is shown is that of the last one, '{run.stages[-1].name}'"
        click.echo(wrapped(told, sys.stderr), err=True)


def tell_origin(loaded: Loaded[RunConfig]) -> None:
    """Say on stderr where model and tokenizer come from, if from a checkpoint."""
    if loaded.below is not None and launcher.rank() == 0:
        told = (
            f"model: as in {loaded.below.origin}, where the config does not say it; "
            f"tokenizer: {loaded.config.data.tokenizer}"
        )
        click.echo(wrapped(told, sys.stderr), err=True)
