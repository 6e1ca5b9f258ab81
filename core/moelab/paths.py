"""Paths as a person writes them: where a leading `~` becomes the home folder, and where a name is looked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from moelab.errors import ConfigError

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, on every file system of Linux and macOS that matters


@dataclass(frozen=True)
class Places:
    """Where what a config names is looked for, plugins and data alike.

    Beside the file in whose text the name stands (where one stands, for one that was typed), then in `search`: what
    `search_path` says and the folders of all config files; last in the current folder.
    """

    said: Mapping[str, Path] = field(default_factory=dict)  # name, as it is spelled -> the folder of the file with it
    search: tuple[Path, ...] = ()

    def of(self, name: str) -> list[Path]:
        """The folders in which to look for `name`, each once."""
        return _distinct(([self.said[name]] if name in self.said else []), self.search)

    def all(self) -> list[Path]:
        """The folders of every name."""
        return _distinct(self.said.values(), self.search)


def _distinct(*folders: Iterable[Path]) -> list[Path]:
    here = Path.cwd()
    return list(dict.fromkeys((here / folder).resolve() for folder in (*chain(*folders), here)))


def user_path(path: str | os.PathLike[str], where: str = "") -> Path:
    """A path that a config, a command line or a caller names; `~` and `~user` are home folders.

    `where` is the config key or option, for the message. Raises ConfigError for a user who is not known, for an
    empty text, which would silently be the current folder, and for what no file system takes as a name.
    """
    key = f"{where}: " if where else ""
    if not isinstance(path, str | os.PathLike):  # of a config that is not typed yet
        raise ConfigError(f"{key}must be a path, not a {type(path).__name__}")
    text = os.fspath(path)
    if not text:
        raise ConfigError(f"{key}names no path; write . for the current folder")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of another encoding, or half of a surrogate pair
        raise ConfigError(f"{key}'{text[:40]}' is no path: it is not UTF-8, as configs are") from error
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ConfigError(
            f"{key}'{text}': no home folder is known for this user; write the path in full, or ./{text} for a name "
            "that begins with ~"
        )
    found = Path(expanded)
    longest = max((len(os.fsencode(part)) for part in found.parts), default=0)
    if longest > LONGEST_NAME or len(os.fsencode(expanded)) > LONGEST_PATH or "\0" in expanded:
        raise ConfigError(
            f"{key}'{text[:40]}' is no path: a name has {LONGEST_NAME} bytes at most and no NUL, a path {LONGEST_PATH}"
        )
    return found.absolute() if str(found).startswith("~") else found  # ./~x is a name, and stays one when asked again


def folder_named(text: str) -> Path | None:
    """The folder that a text names as a path would, where there is one; a text may be anything else."""
    named = os.path.expanduser(text) if text else text
    return Path(named) if os.path.isdir(named) else None


def looked_in(path: Path) -> str:
    """What to add to a complaint that a path is not there: from where a relative one was looked for."""
    return "" if path.is_absolute() else f" in {Path.cwd()}"


def unresolved_hint(value: object) -> str:
    """What to add to a complaint about a value of a stored config that came from the environment."""
    if not (isinstance(value, str) and "${" in value):
        return ""
    return (
        "; ${...} is looked up only in a config that you pass, never in one that a run stored: pass that "
        "config again, or the value as key=value"
    )
