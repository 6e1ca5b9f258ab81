"""What a sweep will run: every run with its name, folder and resolved config, checked before the first one starts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moelab.builder import build_balance_losses, build_model
from moelab.config.files import Layer
from moelab.config.load import Loaded, load_config
from moelab.config.run import RunConfig
from moelab.config.scalars import settle
from moelab.config.stored import to_yaml
from moelab.config.text import read_tree
from moelab.data.tokenizer import load_tokenizer
from moelab.errors import ConfigError
from moelab.origin import check_vocabulary
from moelab.paths import user_path
from moelab.registry import Registry
from moelab.training.setup import resolve_run
from moelab.training.start import find_start
from moelab_tools.checkpoints import load_run, take_up_plugins
from moelab_tools.compare.differences import flatten, is_bookkeeping
from moelab_tools.sweep.axes import Axis, Words

RUNS, CONFIGS, LOGS, REPORT, RECORD = "runs", "configs", "logs", "report", "sweep.json"  # in a sweep's folder
LONGEST_VALUE = 32  # characters of a value in a name
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9.+-]+")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep; its folder is named as it is."""

    variant: str
    seeds: str  # "seed0", "seed0_order1"
    folder: Path
    config: RunConfig  # resolved
    arguments: tuple[str, ...]  # what `moelab train` would take
    registry: Registry = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        return f"{self.variant}_{self.seeds}"

    def tree(self) -> dict[str, Any]:
        """{key: value} of all that decides the run's result, as a run folder stores it."""
        return settled_keys(read_tree(to_yaml(self.config), self.name))

    def hash(self) -> str:
        """Of `tree`, so that a changed run is told from the same one."""
        return digest(self.tree())


def settled_keys(tree: Any) -> dict[str, Any]:
    """{dotted key: value} of a config, without what changes nothing of a result."""
    return {key: value for key, value in flatten(settle(tree)) if not is_bookkeeping(key)}


def digest(value: Any) -> str:
    """A hash of plain data that does not hang on the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def plan_runs(words: Words, out: Path, *, trust: bool = False) -> dict[str, list[PlannedRun]]:
    """{variant: its runs}, every combination. Raises ConfigError naming the override and the run it is wrong in."""
    variants = list(words.choices(of_seeds=False))
    return {
        label: [
            plan_run(label, words.arguments(chosen | seeds), out, trust=trust) for seeds in words.choices(of_seeds=True)
        ]
        for label, chosen in zip(variant_names(words, variants), variants, strict=True)
    }


def plan_run(
    variant: str,
    arguments: Sequence[str],
    out: Path,
    *,
    trust: bool = False,
    below: Callable[[Mapping[str, Any]], Layer | None] | None = None,
    seeds: str | None = None,
) -> PlannedRun:
    """Load, resolve and build one run without weights or data; `below`: what its weights, not there yet, will say.

    `seeds`: how the name tells them; None: the seed, and the order where it is another.
    """
    provisional = [*arguments, f"run_dir={out / RUNS / variant}"]
    loaded = (
        load_config(provisional, RunConfig, below=below, trust=trust) if below else load_run(provisional, trust=trust)
    )
    config = _of_one_stage(loaded)
    order = "" if config.order_seed == config.seed else f"_order{config.order_seed}"
    seeds = seeds or f"seed{config.seed}{order}"
    config.name = f"{variant}_{seeds}"
    config.run_dir = str(out / RUNS / config.name)
    try:
        registry = check_run(replace(loaded, config=config), trust=trust, start=below is None)
    except ConfigError as error:
        blamed = loaded.blame(error)
        raise ConfigError(f"{blamed}; in the run {config.name}, and no run was started") from error
    return PlannedRun(variant, seeds, user_path(config.run_dir, "run_dir"), config, tuple(arguments), registry)


def _of_one_stage(loaded: Loaded[RunConfig]) -> RunConfig:
    """The config as its run will have it: of post-training with what follows from the stage, so that it is known again.

    Raises ConfigError for several stages, whose runs are several.
    """
    config = loaded.config
    if not config.alignment:
        return config
    from moelab.alignment.run import ready, stage_configs

    if len(config.alignment) > 1:
        raise ConfigError(
            f"alignment: has {len(config.alignment)} stages, and a run here is of one; prepare the others one by one"
        )
    (own,) = stage_configs(config)
    ready(own)
    return own


def check_run(loaded: Loaded[RunConfig], *, trust: bool, start: bool = True) -> Registry:
    """Build all but weights and data, as `moelab.training.setup.prepare` will; the config is resolved in place."""
    config = loaded.config
    if trust:
        take_up_plugins(config)
    registry = Registry(config.plugins, config.entry_points, config.places("plugins"))
    resolve_run(config, registry)
    build_balance_losses(config.model, registry)
    build_model(config.model, registry, device="meta", seed=None)
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_vocabulary(config.model.vocab_size, tokenizer, config.data.tokenizer)
    if start:
        find_start(config, tokenizer, registry)
    return registry


def variant_names(words: Words, variants: Sequence[dict[str, str]]) -> list[str]:
    """A readable name for each combination of values: `router-switch_lr-1e-3`."""
    keys = _short_keys([axis for axis in words.axes if not axis.of_seeds])
    names = ["_".join(f"{keys[key]}-{_in_a_name(value)}" for key, value in chosen.items()) for chosen in variants]
    if names == [""]:
        names = [Path(words.files[-1]).stem if words.files else "run"]
    return [
        name if names.count(name) == 1 else f"{name}-v{index}" for index, name in enumerate(names)
    ]  # values that differ only in what a name can't hold


def _short_keys(axes: Sequence[Axis]) -> dict[str, str]:
    """The last word of a key that is not `name`; as much of it as tells it from the others."""
    pieces = {axis.key: [_in_a_name(one) for one in re.split(r"[.\[\]]+", axis.key) if one] for axis in axes}
    pieces = {key: words[:-1] if words[-1] == "name" and len(words) > 1 else words for key, words in pieces.items()}
    found: dict[str, str] = {}
    for key, own in pieces.items():
        length = 1
        others = [words for other, words in pieces.items() if other != key]
        while length < len(own) and any(words[-length:] == own[-length:] for words in others):
            length += 1
        found[key] = ".".join(own[-length:])
    return found


def _in_a_name(text: str) -> str:
    """Characters that no shell, no override and no file system takes for something else."""
    kept = re.sub(r"(?<![A-Za-z0-9])-(?=[0-9.])", "minus", text)
    kept = _NOT_IN_NAMES.sub("_", kept).strip("_")
    return kept[:LONGEST_VALUE].rstrip("_") or "empty"


def write_config(run: PlannedRun, out: Path) -> Path:
    """The run's own config file, which `moelab train` reads: resolved, but for what comes from the environment."""
    path = out / CONFIGS / f"{run.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f"# One run of a sweep, resolved. Again, alone: moelab train {path} --resume\n"
    path.write_text(head + to_yaml(run.config), encoding="utf-8")
    return path
