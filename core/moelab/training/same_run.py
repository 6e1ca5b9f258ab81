"""Whether a stored config is that of a run as it is planned now, though an earlier version may have stored it.

What it does not say, since there was no such key then, is today's default, a plugin's options included; what it says
counts, also where it was a default then and is none any more. So a new key makes no other run of what is there, and a
default that changed is told like any other difference, with a word that nothing but the default says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moelab.across_versions import as_today
from moelab.checkpoint import read_run_config, read_state
from moelab.config.run import RunConfig
from moelab.config.scalars import settle
from moelab.config.stored import is_sealed, stored
from moelab.errors import ConfigError
from moelab.training.setup import Setup

# What may differ when a run is resumed: none of it changes the numbers of a step.
FREE_ON_RESUME = {
    "run_dir", "resume", "name", "declaration", "observers", "evaluation", "search_path", "store_environment",
    "parallel",
}  # fmt: skip
REPLANS = ("train.steps", "schedule.rewarm_steps")  # may differ where `moelab.training.plan` knows what that means
FREE_TRAIN_KEYS = {
    "log_every",
    "probe_every",
    "save_every",
    "save_in_background",
    "keep_checkpoints",
    "init_from",
    "init_overrides",
    "keep_best",
    "patience",
    "autotune",  # a run goes on by the ways that it began with
}
DEFAULT = " by default"  # behind a value that the schema itself gives a key


def apart(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys in which two flat configs differ."""
    return [key for key in {**now, **then} if then.get(key) != now.get(key)]


def by_default(key: str, value: Any) -> str:
    """DEFAULT where this is what a config says that does not name the key."""
    return DEFAULT if key in (known := dict(_flat(settle(stored(RunConfig())), ()))) and known[key] == value else ""


def check_same_run(setup: Setup, checkpoint: Path) -> None:
    """Refuse to resume under another config. Raises ConfigError naming the keys that differ."""
    before = as_today(stored(read_run_config(checkpoint)), RunConfig, setup.registry)
    then, now = _fixed_part(before), _fixed_part(stored(setup.config))
    known = all(isinstance(config["train.steps"], int) for config in (then, now))  # and not from the environment
    free = REPLANS if known else ()
    different = sorted(key for key in apart(then, now) if key not in free)
    if different:
        lines = "; ".join(
            f"{key}: {then.get(key)!r} then, {now.get(key)!r} now{by_default(key, now.get(key))}"
            for key in different[:5]
        )
        raise ConfigError(
            f"{different[0]}: {checkpoint} was written under another config ({lines}); resume with the same, "
            "or start a new run from these weights with train.init_from"
        )
    outside = fixed_environment(setup.config)
    sealed = str(read_state(checkpoint).get("environment", ""))
    if outside and not is_sealed(outside, sealed):
        raise ConfigError(
            f"{next(iter(outside))}: {checkpoint} was written in another environment: what {', '.join(outside)} took "
            "from it then is something else now; set the variables as they were, or start a new run with "
            "train.init_from"
        )


def fixed_environment(config: RunConfig) -> dict[str, Any]:
    """{key: value} of what came from the environment and must be the same when the run goes on."""
    values = _fixed_part(dataclasses.asdict(config))
    return {key: values[key] for key in map(".".join, sorted(config.as_written)) if key in values}


def _fixed_part(config: dict[str, Any]) -> dict[str, Any]:
    tree = {k: settle(v) for k, v in config.items() if k not in FREE_ON_RESUME}
    tree["train"] = {k: v for k, v in tree["train"].items() if k not in FREE_TRAIN_KEYS}
    return dict(_flat(tree, ()))


def _flat(tree: Any, key_path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf)."""
    if isinstance(tree, list) and tree:
        tree = dict(enumerate(tree))
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, (*key_path, str(key)))
    else:
        yield ".".join(key_path), tree
