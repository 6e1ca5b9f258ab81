"""A file of prompts: JSON lines with a "prompt" or with "messages", or a text file with a prompt on each line.

Results keep what stood beside a prompt, so that a file of questions with their answers comes back with both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelab.errors import DataError
from moelab.printable import printable
from moelab.safe_files import Reading, json_lines, kind_of, read_text

READING = Reading(DataError, 'give JSON lines with "prompt" or "messages", or a .txt file with a prompt on each line')
RESULT_KEYS = ("prompt", "text", "sample", "checkpoint", "ended", "tokens")  # what results have of their own


@dataclass(frozen=True)
class Prompt:
    """One prompt, and what stood beside it."""

    where: str  # the file and line
    text: str | None  # None: it is messages
    messages: list[Any] | None = None
    beside: dict[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> str | list[Any]:
        """What a model is given."""
        return self.messages or [] if self.text is None else self.text


def read_prompts(path: Path) -> list[Prompt]:
    """All of a file, by its ending: .jsonl or .json lines, anything else is text. DataError with file and line."""
    jsonl = path.suffix in (".jsonl", ".json", ".ndjson")
    prompts = _from_json(path) if jsonl else _from_text(path)
    if not prompts:
        READING.refuse(path, "holds no prompt")
    return prompts


def _from_text(path: Path) -> list[Prompt]:
    lines = read_text(path, READING).split("\n")
    return [Prompt(f"{path}:{number}", line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]


def _from_json(path: Path) -> list[Prompt]:
    found = []
    for where, entry in json_lines(path, READING, finite=True):
        text, messages = entry.get("prompt"), entry.get("messages")
        if isinstance(text, list) and messages is None:  # as preference sets write a conversation
            text, messages = None, text
        if (text is None) == (messages is None):
            READING.refuse(where, 'must hold either "prompt" or "messages"')
        if text is not None and (not isinstance(text, str) or not text):
            said = "an empty text" if text == "" else kind_of(text)
            READING.refuse(where, f'"prompt" must be a text of at least one character, not {said}')
        if messages is not None and not isinstance(messages, list):
            READING.refuse(where, f'"messages" must be a list, not {kind_of(messages)}')
        taken = sorted((set(RESULT_KEYS) - {"prompt"}) & entry.keys())
        if taken:
            READING.refuse(where, f"has {printable(', '.join(taken))} of its own, which results are written under")
        beside = {key: value for key, value in entry.items() if key not in ("prompt", "messages")}
        found.append(Prompt(where, text, messages, beside))
    return found
