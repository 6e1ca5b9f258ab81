"""Whether a run can go on from a checkpoint: what its state.json must say, and what is other than it was then."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moelab.checkpoint import STATE
from moelab.errors import CheckpointError, UserError
from moelab.integrity import Choice
from moelab.records import Record
from moelab.safe_files import Reading
from moelab.train.progress import can_continue

logger = logging.getLogger("moelab")

PLUGINS, VERSIONS = "plugins", "versions"  # of state.json: {package: version}


def tell_choice(choice: Choice) -> None:
    """A line for each checkpoint that is passed over, and for what should be known of the one that is taken."""
    for finding in choice.skipped:
        logger.warning(
            "%s is damaged and passed over: %s; going on from %s", finding.folder, finding.summary(), choice.folder
        )
    for remark in choice.remarks:
        logger.warning(remark)


def check_state(state: Mapping[str, Any], checkpoint: Path, fingerprint: str) -> None:
    """Raises CheckpointError for a state.json that lacks a key or holds another kind of value; UserError where the run
    was trained on another corpus than `fingerprint`'s.
    """
    path = checkpoint / STATE
    if not can_continue(state):
        raise CheckpointError(
            f"{checkpoint}: its {STATE} lacks counters: it was changed, or an earlier version wrote it, which did not "
            "count what the experts served, so its FLOPs can't be continued; start a new run from these weights with "
            "train.init_from"
        )
    record = Record(str(path), state, Reading(CheckpointError, "use an earlier checkpoint, or restore it"))
    for key in ("step", "tokens", "served_weights"):
        record.integer(key, least=0)
    record.number("seconds", least=0.0)
    if len(record.listed("logged", float)) != 3:
        record.refuse("logged", "three numbers")
    for key in (PLUGINS, VERSIONS):
        for package in record.record(key, optional=True).values:
            record.record(key).text(package)
    found = record.text("data_fingerprint")
    if found != fingerprint:
        raise UserError(
            f"{checkpoint}: was trained on another corpus (fingerprint {found[:12]}, now {fingerprint[:12]}): the data "
            "or the installed packages changed; restore them, or start anew"
        )


def other_versions(state: Mapping[str, Any], plugins: Mapping[str, str], packages: Mapping[str, str]) -> Iterator[str]:
    """A line for each package whose version is not the one that wrote the checkpoint."""
    for key, now in ((PLUGINS, plugins), (VERSIONS, packages)):
        then = state.get(key) or {}
        for name in sorted(then.keys() | (now.keys() if then else set())):
            if then.get(name) != now.get(name):
                yield (
                    f"{name}: {then.get(name, 'not there')} wrote the checkpoint, {now.get(name, 'not there')} goes on "
                    "from it: the numbers may be others than those of a run that was not interrupted"
                )
