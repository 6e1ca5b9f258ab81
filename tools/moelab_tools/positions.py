"""`--attention` and `--rope-scaling` of a command: another reach for a model whose weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import ceil
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moelab.config.scalars import MISSING_TEXT
from moelab.config.text import read_tree
from moelab.errors import ConfigError
from moelab.hookspecs import ATTENTIONS, ROPE_SCALINGS, ExtensionPoint

if TYPE_CHECKING:
    from moelab.config.run import RunConfig
    from moelab.nn.transformer import Transformer
    from moelab.registry import Registry

CommandT = TypeVar("CommandT", bound=Callable[..., Any])
OPTIONS: dict[str, ExtensionPoint[Any, Any]] = {"--attention": ATTENTIONS, "--rope-scaling": ROPE_SCALINGS}
TRAINED, FACTOR, WINDOW = "original_max_position_embeddings", "factor", "window"


def position_options(command: CommandT) -> CommandT:
    """Both options, as `attention` and `rope_scaling`."""
    for option, what in (
        ("--rope-scaling", "Stretch the rotary embedding, weights as they are: yarn, linear, dynamic, ..."),
        ("--attention", "Attend otherwise, weights as they are: dual_chunk, sliding_window, ..."),
    ):
        shown = f"{what} A name, or {{name: ..., options}}."
        command = click.option(option, metavar="PART", help=shown)(command)
    return command


@dataclass(frozen=True)
class Positions:
    """What the options said."""

    attention: str | None = None
    rope_scaling: str | None = None
    typed: bool = field(default=True, compare=False)  # as options; False: in a file of ways, as its keys

    def apply(self, model: Transformer, registry: Registry, length: int, trained: int) -> list[str]:
        """Reposition `model` for texts of `length` tokens; -> a line for each number that was filled in.

        What an option leaves out of the trained length, of a window and of a factor that are needed is filled in:
        `trained`, twice, and how many times that `length` is. Raises ConfigError naming the option.
        """
        from moelab.builder import reposition

        parts, told = {}, []
        for option, said in (("--attention", self.attention), ("--rope-scaling", self.rope_scaling)):
            if said is not None:
                key = option.removeprefix("--").replace("-", "_")
                parts[key], filled = _part(option, said, registry, length, trained)
                told += [f"{option} {parts[key]['name']}: {filled}"] if filled else []
        try:
            if parts:
                reposition(model, registry, **parts)
        except ConfigError as error:
            raise ConfigError(self._in_its_words(str(error))) from error
        return told

    def _in_its_words(self, message: str) -> str:
        """A complaint about a config's key as one about what said it here."""
        for option, point in OPTIONS.items():
            if message.startswith(point.key):
                name = option if self.typed else point.key.removeprefix("model.")
                rest = message.removeprefix(point.key).removeprefix(".name")
                return name + (f", {rest[1:]}" if rest.startswith(".") else rest)
        return message


def trained_length(run: RunConfig | None, longest: int) -> int:
    """Tokens that a model was trained on at once: as its run says, else its longest sequence."""
    return longest if run is None else run.train.sequence_length


def _part(option: str, said: str, registry: Registry, length: int, trained: int) -> tuple[dict[str, Any], str]:
    """(the part, what was filled in, in words)."""
    point = OPTIONS[option]
    tree = read_tree(said, option)
    part = dict(tree) if isinstance(tree, Mapping) else {"name": str(said)}
    if not isinstance(tree, Mapping) and "{" in said:
        raise ConfigError(f"{option}: must be a name, or {{name: ..., options}}, not '{said}'")
    known = registry.components(point).get(str(part.get("name")))
    filled = {}
    if known is not None:  # else the registry says what there is
        defaults = {one.name: one.default for one in fields(known.options)}
        if TRAINED in defaults and part.get(TRAINED) is None:
            filled[TRAINED] = trained
        if defaults.get(WINDOW) == MISSING_TEXT and WINDOW not in part:
            filled[WINDOW] = trained
        if defaults.get(FACTOR) == MISSING_TEXT and FACTOR not in part:
            filled[FACTOR] = max(1, ceil(length / int(part.get(TRAINED) or trained)))
    return part | filled, ", ".join(f"{key} {value}" for key, value in filled.items())
