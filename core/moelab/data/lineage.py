"""How weights were made, and with which seeds: what tells repetitions of one recipe from another recipe.

`moelab_lineage.json` stands in every checkpoint beside `moelab_data.json` and is carried by `moelab export` and
`moelab upcycle`: a hash of everything that made the weights but the seeds, and the seeds of each stage (training,
conversion). Two runs that start from weights of one recipe and other seeds are repetitions, wherever those lie.
Weights without the file are their own recipe, named by their folder: nothing says what they have in common.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.config.interpolation import KeyPath, replace_leaves
from moelab.errors import CheckpointError
from moelab.records import Record, read_record
from moelab.safe_files import Reading

LINEAGE = "moelab_lineage.json"
FORMAT_VERSION = 1
READING = Reading(CheckpointError, "copy it again, with the version of moelab that wrote it, or delete it")
TRAINING, CONVERSION = "training", "conversion"
Stage = tuple[str, str]  # training or conversion, its seeds in words
# Of a run's config, what changes no weight.
_FREE = {"run_dir", "name", "declaration", "resume", "observers", "evaluation", "search_path", "seed"}
_FREE_TRAIN = {
    "init_from",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "keep_best",
    "patience",
    "gradient_shares_every",
    "probe_every",
}


@dataclass(frozen=True)
class Lineage:
    """Of some weights. `stages`: oldest first."""

    recipe: str
    stages: tuple[Stage, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "stages": [list(stage) for stage in self.stages]}

    @classmethod
    def unknown(cls, name: str) -> Lineage:
        """Of weights of which nothing is known but their name."""
        return cls(f"the weights {name}")

    @classmethod
    def from_record(cls, content: Record) -> Lineage:
        """What `to_json` gave."""
        stages = content.listed("stages", list, most=1000)
        if not all(len(stage) == 2 and all(isinstance(part, str) for part in stage) for stage in stages):
            content.refuse("stages", "a list of [stage, seeds]")
        return cls(content.text("recipe"), tuple((stage, seeds) for stage, seeds in stages))

    def to_bytes(self) -> bytes:
        """The content of moelab_lineage.json."""
        return (json.dumps({"format_version": FORMAT_VERSION, **self.to_json()}, indent=1) + "\n").encode()


def lineage_of(folder: Path, name: str) -> Lineage:
    """What a folder of weights says; `name` stands for weights that say nothing. Raises CheckpointError if broken."""
    path = folder / LINEAGE
    if not path.is_file():
        return Lineage.unknown(name)
    content = read_record(path, READING)
    content.integer("format_version", most=FORMAT_VERSION)
    return Lineage.from_record(content)


def carried_lineage(folder: Path) -> dict[str, bytes]:
    """{file name: content} of what a copy of these weights carries."""
    return {LINEAGE: lineage_of(folder, folder.name).to_bytes()} if (folder / LINEAGE).is_file() else {}


def trained(
    config: Mapping[str, Any],
    start: Lineage | None,
    made: Mapping[str, Any] | None = None,
    named: Mapping[KeyPath, Lineage] | None = None,
) -> Lineage:
    """Of the weights that a run makes from `start`, or from random ones.

    `config`: its tree, as any version would have stored it (`moelab.across_versions.as_ever`). `made`: what it doesn't
    say of their making, such as that they are those of its best evaluation. `named`: the weights that other keys of the
    config name, which count as their recipes.
    """
    tree: dict[str, Any] = {key: value for key, value in config.items() if key not in _FREE}
    tree["train"] = {key: value for key, value in tree["train"].items() if key not in _FREE_TRAIN}
    tree["data"] = {key: value for key, value in tree["data"].items() if key != "order_seed"}
    # `made` says whether and where that happened
    tree["schedule"] = {key: value for key, value in tree["schedule"].items() if key != "rewarm_steps"}
    tree |= {"made": dict(made)} if made else {}
    tree = replace_leaves(tree, {path: one.recipe for path, one in (named or {}).items()})
    seed, order = config["seed"], config["data"]["order_seed"]
    seeds = f"seed {seed}" if order in (None, seed) else f"seed {seed}, order {order}"
    return _after([start] if start else [], tree, (TRAINING, seeds), aside=stages_aside(start, (named or {}).values()))


def stages_aside(start: Lineage | None, others: Iterable[Lineage]) -> tuple[Stage, ...]:
    """The stages of other weights that a run reads, but for those that are where its own come from."""
    known, found = (start.stages if start else ()), dict[tuple[Stage, ...], None]()
    for one in others:
        if one.stages != known[: len(one.stages)]:
            found[one.stages] = None
    return tuple(stage for stages in found for stage in stages)


def converted(identity: Mapping[str, Any], seed: int, sources: Sequence[Lineage]) -> Lineage:
    """Of what an upcycling made; `identity` is all that its bytes depend on but the seed and the sources.

    Its recipe stands there as any version would have stored it, as a run's config does for `trained`.
    """
    return _after(sources, identity, (CONVERSION, f"seed {seed}"))


def _after(
    before: Sequence[Lineage], made_by: Mapping[str, Any], stage: Stage, *, aside: tuple[Stage, ...] = ()
) -> Lineage:
    text = json.dumps([[one.recipe for one in before], made_by], sort_keys=True, default=str)
    recipe = hashlib.sha256(text.encode()).hexdigest()[:32]
    return Lineage(recipe, (*(known for one in before for known in one.stages), *aside, stage))
