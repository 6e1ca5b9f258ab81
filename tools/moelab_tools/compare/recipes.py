"""What sets the variants apart, and how to repeat them: config keys by variant, data and machine, command lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moelab.printable import printable
from moelab.safe_files import read_text
from moelab_tools.compare.comparison import Comparison, Line
from moelab_tools.compare.differences import flatten, is_bookkeeping, some
from moelab_tools.compare.runs import READING, Run
from moelab_tools.compare.variants import SEEDS
from moelab_tools.compare.verdict import PRACTICAL

LONGEST_VALUE, LONGEST_CONFIG = 160, 40_000  # characters
NO_KEY = "–"
LARGE = ("data.manifest", "data.left_out", "data.seen", "data.seed", "data.order_seed", "data.split_seed", "folder")
SHORT_HASH = 12  # digits


@dataclass(frozen=True)
class Row:
    """A config key and what each variant has there, in the order of the lines."""

    key: str
    values: list[str]


@dataclass(frozen=True)
class Differences:
    """`apart`: keys in which variants that have them differ; `partly`: alike in those that have them."""

    apart: list[Row]
    partly: list[Row]


def config_by_variant(comparison: Comparison) -> Differences:
    """Without seeds, names and places, which tell runs apart and not recipes."""
    by_name = {run.name: run for run in comparison.runs}
    flat = [[dict(flatten(by_name[name].config)) for name in line.runs] for line in comparison.lines]
    keys = sorted({key for runs in flat for run in runs for key in run if key not in SEEDS and not is_bookkeeping(key)})
    apart: list[Row] = []
    partly: list[Row] = []
    for key in keys:
        values = [_value(key, runs) for runs in flat]
        present = set(values) - {NO_KEY}
        if len(present) > 1:
            apart.append(Row(key, values))
        elif len(set(values)) > 1:
            # `model.moe: none` where others have a whole tree there is the difference; the tree's keys follow from it.
            above = any(other.startswith((f"{key}.", f"{key}[")) for other in keys)
            (apart if above else partly).append(Row(key, ["see below" if above and v == NO_KEY else v for v in values]))
    return Differences(apart, partly)


def _value(key: str, runs: Sequence[dict[str, Any]]) -> str:
    found = [printable(_spelled(run[key]), LONGEST_VALUE) for run in runs if key in run]
    return " or ".join(dict.fromkeys(found)) if found else NO_KEY


def _spelled(value: Any) -> str:
    if value is None:
        return "none"
    if value in ([], {}):
        return "empty"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def facts_by_value(comparison: Comparison) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(what all runs share, a phrase each; what differs: [(key, [value and who has it])])."""
    shared, apart = [], []
    for key, values in comparison.facts.items():
        if key in LARGE or key.startswith("plugins."):
            continue
        groups: dict[str, list[str]] = {}
        for name, value in zip(comparison.names, values, strict=True):
            if value is not None or key == "init_from":  # a dense run has no backends
                groups.setdefault(_short(key, value), []).append(name)
        if len(groups) == 1:
            shared.append(f"{key.rpartition('.')[2].replace('_', ' ')} {next(iter(groups))}")
        elif groups:
            apart.append((key, [f"{value}: {some(names)}" for value, names in groups.items()]))
    return [*shared, *_plugins(comparison)], apart


def _short(key: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if key == "backends":  # `cpu float32, up to 8 assignments: grouped_mm (little work), ...`: their names alone
        return ", ".join(sorted(set(re.findall(r": (\w+)", str(value))))) or str(value)
    text = printable(_spelled(value), LONGEST_VALUE)
    hashed = key in ("data.fingerprint", "data.tokenizer", "git")
    return text.removeprefix("sha256:")[:SHORT_HASH] if hashed else text


def _plugins(comparison: Comparison) -> list[str]:
    """Those that are not moelab's own, which have its version."""
    others = {
        key.removeprefix("plugins."): next(str(value) for value in values if value is not None)
        for key, values in comparison.facts.items()
        if key.startswith("plugins.") and not key.startswith(("plugins.moelab_plugins.", "plugins.moelab"))
    }
    return [f"plugin {printable(name)} {printable(version)}" for name, version in others.items()]


@dataclass(frozen=True)
class Recipe:
    """How one variant is trained again."""

    name: str
    commands: list[str]  # one a run: from the config that its folder keeps, into a new folder
    config: str  # of its first run, as it lies on the disk


def comparing(comparison: Comparison) -> str:
    """The command that makes this report again."""
    rules = comparison.rules
    parts = ["moelab", "compare", *(str(run.path) for run in comparison.runs)]
    parts += ["--baseline", comparison.baseline] if rules.named and comparison.baseline else []
    parts += ["--practical", f"{100 * rules.practical:g}"] if rules.practical != PRACTICAL else []
    parts += ["--screening"] if rules.screening else []
    parts += ["--best"] if any(run.picked is not None for run in comparison.runs) else []
    parts += ["--allow-different-data"] if comparison.conflicts else []
    return _command(parts)


def recipes(comparison: Comparison) -> list[Recipe]:
    """Of each variant, in the order of the lines."""
    by_name = {run.name: run for run in comparison.runs}
    return [_recipe(line, [by_name[name] for name in line.runs]) for line in comparison.lines]


def _recipe(line: Line, runs: Sequence[Run]) -> Recipe:
    commands = [
        _command(["moelab", "train", str(run.path / "config.yaml"), f"run_dir={run.path}_again"]) for run in runs
    ]
    text = read_text(runs[0].path / "config.yaml", READING)
    return Recipe(line.name, commands, printable(text, LONGEST_CONFIG, keep="\n"))


def _command(parts: Sequence[str]) -> str:
    return printable(shlex.join(parts))
