"""What lies in the folder of a planned run: nothing, a part, the whole run, or another one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moelab.checkpoint import CONFIG
from moelab.config.scalars import spelled
from moelab.config.stored import read_stored_tree
from moelab.errors import ConfigError
from moelab.train.run_folder import is_finished
from moelab.train.run_lock import LOCK
from moelab_tools.sweep.plan import PlannedRun, settled_keys

MOST_KEYS = 4  # in a sentence

Kind = Literal["new", "finished", "partial", "changed"]


@dataclass(frozen=True)
class State:
    """Of one run's folder; `why` says what changed."""

    kind: Kind
    why: str = ""

    def arguments(self, config: Path, *, force: bool) -> list[str] | None:
        """What moelab is called with to bring the run to its end; None: it is there."""
        if self.kind == "finished":
            return None
        if self.kind == "changed":
            assert force, "a run whose config has changed is refused before anything starts"
            return ["train", str(config), "--force"]
        return ["train", str(config), *(["--resume"] if self.kind == "partial" else [])]


def state_of(run: PlannedRun) -> State:
    """By the config that the folder holds; a folder without one was left before its first step."""
    folder = run.folder
    if not folder.is_dir() or not any(item.name != LOCK for item in folder.iterdir()):
        return State("new")
    if not (folder / CONFIG).is_file():
        return State("partial")
    try:
        then = settled_keys(read_stored_tree(folder / CONFIG))
    except ConfigError as error:
        return State("changed", f"its config can't be read: {error}")
    now = run.tree()
    different = [key for key in {**now, **then} if then.get(key) != now.get(key)]
    if different:
        told = "; ".join(f"{key}: {_value(then, key)} there, {_value(now, key)} here" for key in different[:MOST_KEYS])
        more = f"; and {len(different) - MOST_KEYS} more" if len(different) > MOST_KEYS else ""
        return State("changed", told + more)
    return State("finished" if is_finished(folder) else "partial")


def _value(tree: dict[str, object], key: str) -> str:
    if key not in tree:
        return "nothing"
    value = tree[key]
    text = str(value) if isinstance(value, list | dict) else spelled(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
