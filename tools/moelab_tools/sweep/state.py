"""What lies in the folder of a planned run: nothing, a part, the whole run, or another one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

from moelab.across_versions import as_today
from moelab.checkpoint import CONFIG, resolve_checkpoint
from moelab.config.run import RunConfig
from moelab.config.scalars import spelled
from moelab.config.stored import read_stored, read_stored_tree, stored
from moelab.data.lineage import lineage_of
from moelab.errors import ConfigError, UserError
from moelab.lock import LOCK
from moelab.paths import user_path
from moelab.safe_files import Reading, read_object
from moelab.training.budget import keep_choice
from moelab.training.run_folder import SUMMARY, is_finished
from moelab.training.same_run import apart, by_default
from moelab_tools.sweep.plan import PlannedRun, digest, settled_keys

MOST_KEYS = 4  # in a sentence

Kind = Literal["new", "finished", "partial", "changed"]


@dataclass(frozen=True)
class State:
    """Of one run's folder; `why` says what changed."""

    kind: Kind
    why: str = ""


def state_of(run: PlannedRun) -> State:
    """By the config that the folder holds; a folder without one was left before its first step."""
    folder = run.folder
    if not folder.is_dir() or not any(item.name != LOCK for item in folder.iterdir()):
        return State("new")
    if not (folder / CONFIG).is_file():
        return State("partial")
    try:
        before = read_stored(folder / CONFIG, RunConfig)
    except ConfigError as error:
        return State("changed", f"its config can't be read: {error}")
    planned = copy.deepcopy(run.config)
    keep_choice(planned, before)
    then, now = settled_keys(as_today(stored(before), RunConfig, run.registry)), settled_keys(stored(planned))
    different = apart(then, now)
    if different:
        told = "; ".join(
            f"{key}: {_value(then, key)} there, {_value(now, key)} here{by_default(key, now.get(key))}"
            for key in different[:MOST_KEYS]
        )
        more = f"; and {len(different) - MOST_KEYS} more" if len(different) > MOST_KEYS else ""
        return State("changed", told + more)
    if (made := _other_weights(run)) is not None:
        return State("changed", made)
    return State("finished" if is_finished(folder) else "partial")


def identity(run: PlannedRun) -> str:
    """A hash of the config that the run's folder holds, else of the one that it will hold.

    A folder of an earlier version goes on being what it was when it was made, so that what was made of it stays good.
    """
    path = run.folder / CONFIG
    return digest(settled_keys(read_stored_tree(path))) if path.is_file() else run.hash()


def _other_weights(run: PlannedRun) -> str | None:
    """Why the weights that a run began with are not those that lie there now, as far as both say how they were made."""
    source = run.config.train.init_from
    if source is None or not (run.folder / SUMMARY).is_file():
        return None
    try:
        then = read_object(run.folder / SUMMARY, Reading(), finite=False).get("lineage")
        now = lineage_of(resolve_checkpoint(user_path(source, "train.init_from")), source).to_json()
    except UserError:  # `moelab train` says what is wrong with them
        return None
    return None if then in (None, now) else f"train.init_from: the weights in {source} were made anew"


def _value(tree: dict[str, object], key: str) -> str:
    if key not in tree:
        return "nothing"
    value = tree[key]
    text = str(value) if isinstance(value, list | dict) else spelled(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
