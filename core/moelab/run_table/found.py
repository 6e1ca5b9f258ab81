"""Finds run folders: those that are named, those that a pattern matches, and all that lie beneath."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from moelab.errors import UserError
from moelab.lock import LOCK
from moelab.paths import user_path
from moelab.training.format import METRICS, SUMMARY

CONFIG = "config.yaml"
_SIGNS = (METRICS, SUMMARY, LOCK)  # beside config.yaml: a checkpoint and an export have none of them
DEEPEST, MOST_FOLDERS = 12, 100_000  # what is looked through beneath one folder


def find_runs(places: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Every run folder that `places` name or hold, each once, in alphabetical order of each place.

    A place is a run folder, a folder that holds some at any depth, or a pattern (`runs/*`). Links are followed to a run
    folder, and no further. Raises UserError for a place that is not there.
    """
    found: dict[Path, Path] = {}
    for place in places:
        for folder in _named(place):
            for run in _beneath(folder):
                found.setdefault(run.resolve(), run)
    return list(found.values())


def is_run(folder: Path) -> bool:
    """Whether a run has begun here: its config lies there, and its lock, its metrics or its summary."""
    try:
        return (folder / CONFIG).is_file() and any(os.path.lexists(folder / sign) for sign in _SIGNS)
    except OSError:  # a folder that may not be looked into
        return False


def _named(place: str | os.PathLike[str]) -> list[Path]:
    path = user_path(place, "runs")
    if path.is_dir():
        return [path]
    if path.exists():
        return []  # `runs/*` of a shell names files too
    matches = [Path(match) for match in sorted(glob.glob(str(path)))] if glob.has_magic(str(path)) else []
    if not matches:
        raise UserError(f"{place}: no such folder, and no pattern that matches one; `moelab train` writes runs/NAME")
    return [match for match in matches if match.is_dir()]


def _beneath(folder: Path) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    waiting, looked_at = [(folder, 0)], 0
    while waiting:
        here, depth = waiting.pop()
        looked_at += 1
        if looked_at > MOST_FOLDERS:
            raise UserError(
                f"{folder}: holds more than {MOST_FOLDERS} folders; name one further in, or runs themselves"
            )
        inner = sorted(_folders(here), key=lambda entry: entry.name)
        runs = {entry.path for entry in inner if is_run(Path(entry.path))}
        yield from map(Path, sorted(runs))
        deeper = [entry for entry in inner if entry.path not in runs and not entry.is_symlink()]
        waiting += [(Path(entry.path), depth + 1) for entry in reversed(deeper) if depth < DEEPEST]


def _folders(folder: Path) -> list[os.DirEntry[str]]:
    """Its folders but the hidden ones, which are half written; none where it may not be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []
