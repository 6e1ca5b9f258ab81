"""What differs between runs: their configs, their data, their machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moelab.config.differing import BOOKKEEPING
from moelab.errors import UserError
from moelab_tools.compare.runs import Document, Run

Table = dict[str, list[Any]]  # key -> one value for each run

MOST_NAMES = 5  # runs that are named: of more it is said how many
FACTS = ("device", "threads", "dtype", "git", "init_from")


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf) of nested mappings and lists; an empty one is a leaf."""
    items: list[tuple[str, Any]] = []
    if isinstance(tree, Mapping):
        items = [(f"{path}.{key}" if path else str(key), value) for key, value in tree.items()]
    elif isinstance(tree, (list, tuple)) and any(isinstance(value, (Mapping, list)) for value in tree):
        items = [(f"{path}[{index}]", value) for index, value in enumerate(tree)]
    if not items:
        yield path, tree
    for key, value in items:
        yield from flatten(value, key)


def is_bookkeeping(key: str) -> bool:
    return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in BOOKKEEPING)


def config_differences(runs: Sequence[Run]) -> Table:
    """Only the keys whose values differ; None where a run has no such key."""
    flat = [dict(flatten(run.config)) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one if not is_bookkeeping(key))
    table = {key: [one.get(key) for one in flat] for key in keys}
    return {key: table[key] for key in sorted(table) if any(value != table[key][0] for value in table[key])}


def facts(runs: Sequence[Run]) -> Table:
    """Data, versions, machine and start of each run; keys that no run has are left out."""
    flat = []
    for run in runs:
        summary = run.summary
        known = {f"data.{key}": value for key, value in summary.get("data", {}).items()}
        known |= {f"versions.{key}": value for key, value in summary.get("versions", {}).items()}
        known |= {f"plugins.{key}": value for key, value in summary.get("plugins", {}).items()}
        known |= {key: summary[key] for key in FACTS if key in summary}
        known["backends"] = ", ".join(map(str, summary.get("backends", []))) or None
        known["folder"] = str(run.path)
        flat.append(known)
    keys = dict.fromkeys(key for one in flat for key in one)
    table = {key: [_short(one.get(key)) for one in flat] for key in keys}
    return {key: values for key, values in table.items() if any(value is not None for value in values)}


def check_comparable(runs: Sequence[Run], allow_different_data: bool) -> list[str]:
    """Why the losses of these runs can't be compared; raises UserError unless that is allowed."""
    conflicts = []
    for what, key in (("data", "fingerprint"), ("tokenizers", "tokenizer")):
        known = {run.name: run.summary["data"].get(key) for run in runs if run.summary}
        if len(set(map(str, known.values()))) > 1:
            listing = "; ".join(f"{name}: {key} {str(value)[:16]}" for name, value in known.items())
            conflicts.append(f"the runs used different {what} ({listing})")
    conflicts += _document_conflicts([run for run in runs if run.documents])
    if conflicts and not allow_different_data:
        raise UserError(
            "these runs can't be compared: " + "; and ".join(conflicts) + ". Compare runs of one corpus and tokenizer, "
            "or pass --allow-different-data to see the numbers anyway"
        )
    return conflicts


def _document_conflicts(runs: Sequence[Run]) -> list[str]:
    """Each run against the first: the same held-out documents, read to the same length."""
    if not runs:
        return []
    first, *others = runs
    conflicts = []
    for run in others:
        mine, theirs = _sizes(run.documents), _sizes(first.documents)
        apart = sorted(name for name in mine.keys() | theirs.keys() if _apart(mine.get(name), theirs.get(name)))
        if not apart:
            continue
        conflicts.append(
            f"the evaluation documents differ ({first.name}: {len(theirs)} documents; {run.name}: {len(mine)} "
            f"documents; {len(apart)} differ, first '{apart[0]}': {_describe(theirs.get(apart[0]))} and "
            f"{_describe(mine.get(apart[0]))})"
        )
    return conflicts


def _sizes(documents: Mapping[str, Document]) -> dict[str, tuple[int, int | None]]:
    """The tokens and bytes that were read of each."""
    return {name: (document.tokens, document.bytes) for name, document in documents.items()}


def _apart(first: tuple[int, int | None] | None, second: tuple[int, int | None] | None) -> bool:
    """Bytes that one side does not know are not other bytes."""
    if first is None or second is None:
        return True
    return first[0] != second[0] or (None not in (first[1], second[1]) and first[1] != second[1])


def _describe(size: tuple[int, int | None] | None) -> str:
    return "absent" if size is None else f"{size[0]} tokens, {size[1]} bytes"


def fairness_warnings(runs: Sequence[Run]) -> list[str]:
    """What makes a comparison of these runs less than fair, though not impossible."""
    warnings = []
    for run in runs:
        if not run.finished:
            warnings.append(f"{run.name} is {run.status}: its numbers are those of its last evaluation or step")
        if not run.summary:
            warnings.append(f"{run.name} has no summary.json (still running, or killed): its data can't be checked")
        warnings += [f"{run.name}: {warning}" for warning in run.warnings]
    for text, value in _unequal(runs):
        groups: dict[str, list[str]] = {}
        for name, one in value.items():
            groups.setdefault(str(one), []).append(name)
        if len(groups) > 1:
            told = [f"{one} in {some(names)}" for one, names in groups.items()]
            more = f"; and {len(told) - MOST_NAMES} other values" if len(told) > MOST_NAMES else ""
            warnings.append(f"{text}: {'; '.join(told[:MOST_NAMES])}{more}")
    return warnings


def some(names: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def _unequal(runs: Sequence[Run]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what it means when they differ, {run: value}) for the runs that know the value."""
    ended = [run for run in runs if run.summary]
    yield (
        "The runs saw different numbers of tokens, see 'Equal budgets'",
        {run.name: f"{run.amount('tokens'):,.0f}" for run in runs},
    )
    for key in ("batch_size", "sequence_length"):
        yield (
            f"The runs read the data in different batches (data.{key})",
            {run.name: run.summary["data"].get(key) for run in ended},
        )
    yield (
        "The runs start from different weights; tokens and FLOPs count from each run's own start",
        _starts(ended),
    )
    yield (
        "Throughput can't be compared across machines",
        {run.name: f"{run.summary.get('device')}, {run.summary.get('threads')} threads" for run in ended},
    )
    yield "The runs computed in different precision", {run.name: run.summary.get("dtype") for run in ended}
    yield (
        "The runs used different versions of torch",
        {run.name: run.summary.get("versions", {}).get("torch") for run in ended},
    )


def _starts(runs: Sequence[Run]) -> dict[str, str]:
    """{run: the weights it starts from}; those that were made by one recipe are one, named by the first."""
    names: dict[str, str] = {}
    starts = {}
    for run in runs:
        source = run.summary.get("init_from") or "random"
        made = (run.summary.get("lineage") or {}).get("recipe") or source
        starts[run.name] = names.setdefault(made, source)
    return starts


def _short(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, float, str)) else str(value)
