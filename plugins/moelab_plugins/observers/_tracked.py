"""What the trackers share: which run of theirs is ours, what they are told, and the message when one is missing."""

from __future__ import annotations

import importlib
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moelab import ConfigError
from moelab.alarms import Alarm
from moelab.printable import printable
from moelab.safe_files import Reading, read_object

READING = Reading(cure="delete it, and the tracker begins a new run")


def require(package: str, extra: str = "") -> None:
    """Raise ConfigError where the client is not installed: before the run begins, not in its first step."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != package:
            raise ConfigError(f"{package} is installed and can't be imported: {error}") from error
        raise ConfigError(
            f"needs the package {package}, which is not installed: pip install 'moelab[{extra or package}]', or take "
            "the observer out of the config"
        ) from error


class TrackedRun:
    """The tracker's name for this run: drawn once, kept in each checkpoint, taken up by who goes on from it."""

    def __init__(self, tracker: str) -> None:
        self._file, self.id, self.resumed = f"{tracker}.json", "", False

    def begin(self, checkpoint: Path | None) -> None:
        """`checkpoint`: what the run goes on from. One without the file was written before there was this observer."""
        path = checkpoint / self._file if checkpoint is not None else None
        self.resumed = path is not None and path.is_file()
        self.id = str(read_object(path, READING)["id"]) if path is not None and self.resumed else secrets.token_hex(4)

    def files(self) -> dict[str, bytes]:
        """For `on_checkpoint`."""
        return {self._file: f'{{"id": "{self.id}"}}\n'.encode()}


def name_of(facts: Mapping[str, Any], run_dir: Path) -> str:
    """As the comparison calls the run."""
    return printable(str(facts.get("name") or run_dir.name))


def plain(value: Any) -> Any:
    """What JSON knows, with texts that can be shown: paths and other objects as their text, NaN as the word."""
    if isinstance(value, Mapping):
        return {printable(str(key)): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int) else printable(str(value), keep="\n\t")


def alarm_lines(alarms: Sequence[Alarm]) -> list[str]:
    """One sentence for each alarm that is on."""
    return [printable(f"{alarm.name}: {alarm.sentence()}") for alarm in alarms]
