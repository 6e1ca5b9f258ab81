"""Paths as a person writes them: the one place where a leading `~` becomes the home folder."""

from __future__ import annotations

import os
from pathlib import Path

from moelab.errors import ConfigError


def user_path(path: str | os.PathLike[str], where: str = "") -> Path:
    """A path that a config, a command line or a caller names; `~` and `~user` are home folders.

    `where` is the config key or option, for the message. Raises ConfigError for a user who is not known, and for an
    empty text, which would silently be the current folder.
    """
    text = os.fspath(path)
    key = f"{where}: " if where else ""
    if not text:
        raise ConfigError(f"{key}names no path; write . for the current folder")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ConfigError(
            f"{key}'{text}': no home folder is known for this user; write the path in full, or ./{text} for a name "
            "that begins with ~"
        )
    found = Path(expanded)
    return found.absolute() if str(found).startswith("~") else found  # ./~x is a name, and stays one when asked again


def unresolved_hint(value: object) -> str:
    """What to add to a complaint about a value of a stored config that came from the environment."""
    if not (isinstance(value, str) and "${" in value):
        return ""
    return (
        "; ${...} is looked up only in a config that you pass, never in one that a run stored: pass that "
        "config again, or the value as key=value"
    )
