"""The declaration as it was written down before the first run, and what was changed of it since, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.config.scalars import settle
from moelab.errors import UserError
from moelab.safe_files import Reading, read_object
from moelab.training.run_folder import write_json
from moelab_tools.compare.differences import flatten
from moelab_tools.experiments.declaration import Declaration
from moelab_tools.sweep.plan import RUNS

REGISTER = "declaration.json"  # in the experiment's folder
FINDINGS = "findings.json"  # in its results
MOST_KEYS = 5


@dataclass(frozen=True)
class Register:
    """What a folder holds of a declaration."""

    hash: str
    declared: Mapping[str, Any]
    amendments: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "hash": self.hash,
            "declared": dict(self.declared),
            "amendments": [dict(one) for one in self.amendments],
        }


def registered(declaration: Declaration, out: Path, results: Path, amend: str | None) -> tuple[Register, list[str]]:
    """-> (what is to be written before the next run, lines to say in bold).

    Raises UserError where the declaration is another one than that of runs or findings that are there, and `amend`
    does not say why.
    """
    before = _known(out, results)
    now = Register(declaration.hash, declaration.tree())
    if before is None:
        if amend is not None:
            raise UserError("--amend: there is no run or finding of another declaration, so there is nothing to amend")
        return now, []
    if before.hash == now.hash:
        return before, _amended(before)
    changed = changes(before.declared, now.declared)
    if amend is None:
        raise UserError(
            f"{declaration.path}: was changed after its first run ({changed}). What was declared then decides; put it "
            'back, or choose another --out and --results, or say why with --amend "...", which the findings will tell'
        )
    if not amend.strip():
        raise UserError("--amend: says nothing; write why the declaration was changed")
    note = {"why": amend.strip(), "changed": changed, "from": before.hash, "to": now.hash}
    after = Register(now.hash, now.declared, (*before.amendments, note))
    return after, _amended(after)


def write_register(register: Register, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / REGISTER, register.to_json())


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The keys that differ, with both values; where none does, a file that is named was changed."""
    first, second = dict(flatten(settle(then))), dict(flatten(settle(now)))  # tuples as lists
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    if not keys:
        return "the text of a config file that it names"
    told = "; ".join(f"{key}: {first.get(key)!r} then, {second.get(key)!r} now" for key in keys[:MOST_KEYS])
    return told + (f"; and {len(keys) - MOST_KEYS} more" if len(keys) > MOST_KEYS else "")


def _known(out: Path, results: Path) -> Register | None:
    """That of runs which have begun, else that of findings; a declaration without either can still be changed."""
    runs = out / RUNS
    if (out / REGISTER).is_file() and runs.is_dir() and any(runs.iterdir()):
        return _read(out / REGISTER, lambda content: content)
    if (results / FINDINGS).is_file():
        return _read(results / FINDINGS, lambda content: content["declaration"])
    return None


def _read(path: Path, part: Any) -> Register:
    reading = Reading(cure="restore it, or delete it if it is not yours")
    content = read_object(path, reading)
    try:
        content = part(content)
        return Register(str(content["hash"]), dict(content["declared"]), tuple(content["amendments"]))
    except (ValueError, KeyError, TypeError) as error:
        reading.refuse(path, f"is no declaration with hash, declared and amendments ({error!r})", error)


def _amended(register: Register) -> list[str]:
    return [
        f"THE DECLARATION WAS CHANGED AFTER THE FIRST RUN: {one['changed']}. Why: {one['why']}"
        for one in register.amendments
    ]
