"""The words of a sweep's command line: config files, fixed overrides, and axes, overrides with more than one value.

    argument   a config file, or  key=values
    values     value {"," value}               more than one value makes an axis
    value      a ".." b                        the whole numbers a, a + 1, ..., b
             | YAML that opens with a quote or a bracket, up to where that closes
             | any other characters but a comma

So `seed=0..4`, `optimizer.lr=1e-3,3e-3`, `model.moe.layout={name: uniform, num_experts: 8},{name: uniform,
num_experts: 16}`; a comma within a text, or two dots between numbers, take quotes: `name="a, b"`. Each value is then
an override as `moelab train` reads it (`moelab.config.files.override_layer`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moelab.config.files import is_override
from moelab.errors import ConfigError
from moelab_tools.compare.variants import SEEDS

MOST_RUNS = 10_000
_RANGE = re.compile(r"(-?[0-9]+)\.\.(-?[0-9]+)")
_NEARLY_A_RANGE = re.compile(r"[-+.0-9eE]*[0-9]\.\.+[-+]?[.0-9][-+.0-9eE]*|[-+]?[0-9]+\.\.|\.\.[-+]?[0-9]+")
_CLOSING = {"[": "]", "{": "}"}
OURS = {"run_dir": "--out FOLDER", "name": "--out FOLDER", "resume": "the same command again"}


@dataclass(frozen=True)
class Axis:
    """An override with its values, as they were typed."""

    key: str
    values: tuple[str, ...]

    @property
    def of_seeds(self) -> bool:
        """Whether its values repeat a variant, and make none."""
        return self.key in SEEDS

    def arguments(self) -> list[str]:
        return [f"{self.key}={value}" for value in self.values]


@dataclass(frozen=True)
class Words:
    """A command line in its parts; overrides stay in their order, since the last one wins."""

    files: tuple[str, ...]
    overrides: tuple[Axis, ...]  # those with a single value too

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(axis for axis in self.overrides if len(axis.values) > 1)

    def choices(self, of_seeds: bool) -> Iterator[dict[str, str]]:
        """{key: value} of each combination of the axes of one kind; one empty combination where there are none."""
        axes = [axis for axis in self.axes if axis.of_seeds == of_seeds]
        for values in itertools.product(*(axis.values for axis in axes)):
            yield dict(zip((axis.key for axis in axes), values, strict=True))

    def arguments(self, chosen: dict[str, str]) -> list[str]:
        """What `moelab train` takes for one run."""
        given = [f"{axis.key}={chosen.get(axis.key, axis.values[0])}" for axis in self.overrides]
        return [*self.files, *given]


def parse_words(arguments: Sequence[str]) -> Words:
    """Raises ConfigError naming the word and what would be right."""
    files = tuple(argument for argument in arguments if not is_override(argument))
    overrides = tuple(parse_axis(argument) for argument in arguments if is_override(argument))
    words = Words(files, overrides)
    count = 1
    for axis in words.axes:
        count *= len(axis.values)
        if (
            overrides[-1 - [other.key for other in reversed(overrides)].index(axis.key)] is not axis
        ):  # the last one wins
            raise ConfigError(f"{axis.key}: is given again behind its values; write all its values in one")
    if count > MOST_RUNS:
        raise ConfigError(f"{' x '.join(axis.key for axis in words.axes)}: {count} runs; {MOST_RUNS} at most")
    return words


def parse_axis(argument: str) -> Axis:
    """One `key=values`."""
    key, _, text = argument.partition("=")
    key = key.strip()
    if key in OURS:
        raise ConfigError(f"{key}: is what a sweep sets for each of its runs; use {OURS[key]}")
    pieces = split_values(text.strip(), key)
    if len(pieces) > 1 and not all(pieces):
        raise ConfigError(f"{key}: has an empty value in '{text.strip()}'; take the comma away, or write null")
    values = tuple(itertools.chain.from_iterable(_expand(piece, key) for piece in pieces))
    repeated = next((value for value in values if values.count(value) > 1), None) if len(values) <= MOST_RUNS else None
    if repeated is not None:
        raise ConfigError(f"{key}: the value {repeated} stands there twice: that would be the same run twice")
    return Axis(key, values)


def whole_numbers(text: str, key: str) -> list[int]:
    """`0..4`, `0,1,5..7` as numbers, each once. Raises ConfigError."""
    axis = parse_axis(f"{key}={text}")
    try:
        return [int(value) for value in axis.values]
    except ValueError as error:
        raise ConfigError(f"{key}: '{text}' is no list of whole numbers; write 0..4 or 0,1,2") from error


def split_values(text: str, key: str) -> list[str]:
    """At the commas outside of quotes and brackets. Raises ConfigError where one of these does not close."""
    pieces: list[str] = []
    start = 0
    while True:
        end = _end_of_value(text, start, key)
        pieces.append(text[start:end].strip())
        if end == len(text):
            return pieces
        start = end + 1


def _end_of_value(text: str, start: int, key: str) -> int:
    """Where the comma behind the value stands that begins at `start`, or the end."""
    begin = start + len(text[start:]) - len(text[start:].lstrip())
    if text[begin : begin + 1] not in ('"', "'", "[", "{"):
        found = text.find(",", start)
        return len(text) if found < 0 else found
    end = _closed(text, begin, key)
    rest = len(text) - len(text[end:].lstrip())
    if rest < len(text) and text[rest] != ",":
        raise ConfigError(f"{key}: '{text[end:].strip()[:40]}' stands behind a value that has ended; put a comma there")
    return rest


def _closed(text: str, begin: int, key: str) -> int:
    """The place behind what opens at `begin`; quotes within brackets hide what is in them."""
    expected: list[str] = []
    quote = ""
    place = begin
    while place < len(text):
        here = text[place]
        if quote:
            if (here == "\\" and quote == '"') or (here == quote == "'" == text[place + 1 : place + 2]):
                place += 1  # what is escaped, and '' for ' within single quotes
            elif here == quote:
                quote = ""
        elif here in "\"'" and (not expected or text[place - 1] in " \t,:[{"):  # not the ' of don't
            quote = here
        elif here in _CLOSING:
            expected.append(_CLOSING[here])
        elif expected and here == expected[-1]:
            expected.pop()
        place += 1
        if not quote and not expected:
            return place
    missing = quote or expected[-1]
    raise ConfigError(f"{key}: '{text[begin:][:40]}' opens with {text[begin]} and has no {missing} that closes it")


def _expand(piece: str, key: str) -> Iterator[str]:
    found = _RANGE.fullmatch(piece)
    if found is None:
        if _NEARLY_A_RANGE.fullmatch(piece):
            raise ConfigError(f"{key}: '{piece}': a range is of two whole numbers, as in 0..4; write the values out")
        yield piece
        return
    first, last = int(found[1]), int(found[2])
    if last < first:
        raise ConfigError(f"{key}: the range {piece} runs down; write {last}..{first}")
    if last - first >= MOST_RUNS:
        raise ConfigError(f"{key}: the range {piece} has {last - first + 1} values; {MOST_RUNS} at most")
    yield from map(str, range(first, last + 1))
