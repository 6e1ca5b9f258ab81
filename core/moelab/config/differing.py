"""What several configs differ in: for each of them, the keys that tell it from the others, and its values there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moelab.config.overlay import section_schemas
from moelab.config.run import RunConfig
from moelab.config.scalars import spelled
from moelab.printable import printable

# How a run is stored and watched changes nothing of what it learns.
BOOKKEEPING = (
    "run_dir", "name", "declaration", "resume", "search_path", "store_environment", "observers", "train.log_every",
    "train.save_every", "train.keep_checkpoints", "train.keep_best", "train.gradient_shares_every",
    "train.probe_every", "schedule.rewarm_steps", "parallel",
)  # fmt: skip
MOST_COUNTED = 2_000  # values that are counted against each other
Differences = list[dict[str, Any]]  # one mapping of dotted keys for each config, in their order
Members = Mapping[int, Any]  # index of a config -> what it has at a place


def differing(configs: Sequence[Mapping[str, Any]], ignored: Sequence[str] = BOOKKEEPING) -> Differences:
    """Only the keys whose values differ, as far as a config has them.

    Parts (`{name: ..., options}`) of different names differ in their name alone: the options of one mean nothing to
    the other, and are compared among parts of one name. A key that some lack, as an older version wrote them, counts
    where the others disagree, and everywhere in mappings whose keys are free (`layers`).
    """
    found: Differences = [{} for _ in configs]
    root = _Comparison(found, frozenset(ignored))
    root.compare_mappings(dict(enumerate(configs)), "", section_schemas(RunConfig))
    return found


def commonest(differences: Differences) -> dict[str, Any]:
    """{key: value} of the keys that more than half of at least three configs have alike."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in differences for key in one):
        values = [one[key] for one in differences if key in one]
        most = max(values, key=values.count) if len(values) < MOST_COUNTED else values[0]
        if len(differences) > 2 and values.count(most) > len(differences) / 2:
            found[key] = most
    return found


def shown(value: Any, longest: int = 40) -> str:
    """A value of a config in short: parts by their names, long texts without their middle."""
    if isinstance(value, Mapping):
        if "name" in value:
            return shown(value["name"], longest)
        inner = ", ".join(f"{key}: {shown(item, longest)}" for key, item in value.items())
        return printable(f"{{{inner}}}", longest)
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, Mapping) and "name" in item for item in value):
            return printable(" + ".join(shown(item, longest) for item in value), longest)
        return printable(f"[{', '.join(shown(item, longest) for item in value)}]", longest)
    return printable(value if isinstance(value, str) else spelled(value), longest)


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """{dotted key: its last words, as many as tell it from the others}; a part goes by its key, without `.name`."""
    words = {key: key.removesuffix(".name").split(".") for key in keys}
    short: dict[str, str] = {}
    for key, pieces in words.items():
        others = [other for name, other in words.items() if name != key]
        for count in range(1, len(pieces) + 1):
            last = pieces[-count:]
            if not last[0].isdecimal() and not any(other[-count:] == last for other in others):
                break
        short[key] = ".".join(last)
    return short


@dataclass(frozen=True)
class _Comparison:
    """Walks all configs at once and writes down where they part."""

    found: Differences
    ignored: frozenset[str]

    def compare(self, members: Members, key: str, schema: Any) -> None:
        values = list(members.values())
        if key in self.ignored or len(values) < 2 or all(value == values[0] for value in values[1:]):
            return
        mappings = {index: value for index, value in members.items() if isinstance(value, Mapping)}
        others = {index: value for index, value in members.items() if index not in mappings}
        if not mappings and all(isinstance(value, list) for value in values) and _alike(values):
            for position in range(len(values[0])):
                self.compare({i: value[position] for i, value in members.items()}, f"{key}.{position}", None)
            return
        self._note(others, key)
        sections = section_schemas(schema)
        groups: dict[Any, dict[int, Any]] = {}
        for index, value in mappings.items():
            groups.setdefault(None if sections else _name(value), {})[index] = value
        if len(groups) > 1 or (others and groups and None not in groups):
            self._note({index: value.get("name") for index, value in mappings.items()}, f"{key}.name")
        for group in groups.values():
            self.compare_mappings(group, key, sections)

    def compare_mappings(self, group: Members, key: str, sections: Mapping[str, Any]) -> None:
        """Key by key; `sections`: the keys of the dataclass that they stand for, none for free mappings."""
        free = not sections and all(str(k).replace("-", "").isdecimal() for value in group.values() for k in value)
        for inner in dict.fromkeys(inner for value in group.values() for inner in value):
            having = {index: value[inner] for index, value in group.items() if inner in value}
            place = f"{key}.{inner}" if key else str(inner)
            if free and len(having) < len(group):
                self._note(having, place)
            else:
                self.compare(having, place, sections.get(inner))

    def _note(self, members: Members, key: str) -> None:
        for index, value in members.items():
            self.found[index][key] = value


def _alike(lists: Sequence[list[Any]]) -> bool:
    """Whether they hold parts of the same names, one by one."""
    names = {tuple(map(_name, value)) for value in lists}
    return len(names) == 1 and None not in next(iter(names))


def _name(value: Any) -> Any:
    name = value.get("name") if isinstance(value, Mapping) else None
    return name if isinstance(name, str) else None
