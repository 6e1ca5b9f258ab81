"""The user's files as conversations for a generator to go on with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelab.alignment.examples import check_roles
from moelab.data.reading import resolve_path
from moelab.errors import DataError
from moelab.paths import Places
from moelab_tools.prompts_file import read_prompts
from moelab_tools.synthesis.asking import digest

CONFIG_KEY = "data"


@dataclass(frozen=True)
class Asked:
    """A prompt as a conversation whose last turn is the user's."""

    where: str  # path:line
    messages: list[Any]
    plain: bool  # the file has it as a text
    beside: dict[str, Any] = field(default_factory=dict)  # the line's other keys

    @property
    def key(self) -> str:
        """By its content alone: what is drawn for it does not hang on its place."""
        return digest(self.messages)


def read_asked(paths: Sequence[str], places: Places) -> tuple[list[Asked], int]:
    """Prompts of all files, each once, and how many came again. Raises DataError with file and line."""
    found: dict[str, Asked] = {}
    again = 0
    for said in paths:
        for prompt in read_prompts(found_file(said, places)):
            messages = [{"role": "user", "content": prompt.text}] if prompt.messages is None else prompt.messages
            try:
                check_roles(messages, "messages", ends="user")
            except DataError as error:
                raise DataError(f"{prompt.where}: {error}") from error
            one = Asked(prompt.where, messages, prompt.messages is None, prompt.beside)
            again += one.key in found
            found.setdefault(one.key, one)
    return list(found.values()), again


def found_file(said: str, places: Places) -> Path:
    """The file that the config names. Raises DataError with the places that were tried."""
    try:
        return resolve_path(said, places)
    except DataError as error:
        raise DataError(str(error).replace("data.source:", f"{CONFIG_KEY}:", 1)) from error


def with_source(beside: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """`source` of a line that is made of another one, whose own is kept in it as `of`."""
    return {**source, "of": beside["source"]} if "source" in beside else source
