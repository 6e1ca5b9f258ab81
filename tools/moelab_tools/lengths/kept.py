"""What lengths gave, kept in the run's folder, one file a checkpoint: lengths/step_00002000/lengths.json.

A way that is looked at again takes the place of what was there, and so do all where the text is another one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.atomic import write_file
from moelab.checkpoint import CHECKPOINTS, CONFIG
from moelab.errors import UserError
from moelab.records import Record, read_record
from moelab.safe_files import Reading
from moelab_tools.lengths.asked import NAME

if TYPE_CHECKING:
    from moelab_tools.lengths.measure import AtLength, Looked

FOLDER, FILE = "lengths", "lengths.json"  # in the run's folder, and in that of a checkpoint below it
FORMAT_VERSION = 1
READING = Reading(UserError, "delete it, and evaluate again with --length")
NUMBERS, BY_LAYER = ("positions", "drift", "drift_within", "passkey"), ("drift_by_place", "entropy")
_PLACES = re.compile(r"[0-9]{1,12}(-[0-9]{1,12})?")
TEXT = ("text", "tokens")  # what says that two looks read the same


def place_of(checkpoint: Path) -> Path | None:
    """Where what is found of a checkpoint is kept; None where it lies in no run folder, whose files are not ours."""
    run = checkpoint.parent.parent
    if checkpoint.parent.name != CHECKPOINTS or not (run / CONFIG).is_file():
        return None
    return run / FOLDER / checkpoint.name


def keep(folder: Path, looked: Looked, found: Mapping[str, Sequence[AtLength]]) -> dict[str, Any]:
    """Write into `folder`, beside what is kept of other ways; -> all that is then kept."""
    text = {"fingerprint": looked.corpus.fingerprint, "document_mask": looked.run.data.document_mask}
    if looked.run.evaluation.domains is not None:
        text["domains"] = looked.run.evaluation.domains
    head = {"format_version": FORMAT_VERSION, "trained": looked.trained, "text": text,
            "tokens": looked.tokens or looked.run.evaluation.sequences * looked.trained}  # fmt: skip
    ways: dict[str, Any] = {}
    if (folder / FILE).is_file():
        known = read_kept(folder / FILE)
        if all(known[key] == head[key] for key in TEXT):
            ways = dict(known["ways"])
    for name, ones in found.items():
        ways[name] = [asdict(one) for one in sorted(ones, key=lambda one: one.length)]
    kept = head | {"ways": ways}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / FILE, json.dumps(kept) + "\n")
    return kept


def read_kept(path: Path) -> dict[str, Any]:
    """What `keep` wrote. Raises UserError naming file, place and cure for whatever else lies there."""
    record = read_record(path, READING)
    version = record.integer("format_version", least=1)
    if version > FORMAT_VERSION:
        READING.refuse(path, f"has format_version {version}, and this moelab reads {FORMAT_VERSION}")
    record.integer("trained", least=1)
    record.integer("tokens", least=1)
    record.record("text")
    ways = record.record("ways")
    for name in ways.values:
        if not NAME.fullmatch(name):  # it becomes a folder's
            READING.refuse(path, f"ways: {name!r} is no name of a way")
        for one in ways.listed(name, dict):
            _check(Record(f"{path}: ways.{name}", one, READING))
    if not ways.values or not all(ways.values.values()):
        record.refuse("ways", "ways, each with lengths")
    return dict(record.values)


def of_run(run: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, what is kept of its checkpoint), by step."""
    found = []
    for path in sorted((run / FOLDER).glob(f"step_*/{FILE}")):
        step = path.parent.name.removeprefix("step_")
        if step.isdecimal():
            found.append((int(step), read_kept(path)))
    return found


def _check(one: Record) -> None:
    one.integer("length", least=1)
    one.number("times", least=0)
    one.number("loss")
    one.number("beyond", None)
    if "beyond" not in one.values:
        one.refuse("beyond", "a number, or null")
    places = [one.record("positions")]
    for key in NUMBERS:
        one.record(key).numbers()
    for key in BY_LAYER:
        places += [layer for _, layer in one.record(key).records()]
    for each in places:
        each.numbers()
        for name in each.values:
            if not _PLACES.fullmatch(name):
                each.refuse(name, "a number of places, as 0064-0127")
    for name in one.record("documents").values:
        pair = one.record("documents").listed(name, float, most=2)
        if len(pair) != 2:
            one.record("documents").refuse(name, "nats and tokens")
