"""Lines that `moelab generate --prompts ... --out` wrote, prompt by prompt, as attempts for a reward to judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelab.data.rewards import Attempt
from moelab.errors import DataError
from moelab.safe_files import Reading, json_lines, kind_of
from moelab_tools.prompts_file import RESULT_KEYS
from moelab_tools.samples import ended_itself

READING = Reading(DataError, "give what `moelab generate CHECKPOINT --prompts FILE --out ANSWERS` wrote")
WANTED: Mapping[str, type] = {"prompt": str, "text": str, "sample": int, "checkpoint": str, "ended": str, "tokens": int}


@dataclass
class Asked:
    """A prompt, and the answers to it in the order of the file."""

    prompt: Any  # a text, or messages
    attempts: list[Attempt] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)  # that wrote each


def read_answers(paths: Sequence[Path]) -> list[Asked]:
    """Prompts in the order in which they first come; the same one of several lines or files is one.

    Raises DataError with file and line for what is no answer.
    """
    found: dict[str, Asked] = {}
    for path in paths:
        for where, line in json_lines(path, READING):
            for key, kind in WANTED.items():
                value = line.get(key)
                if not isinstance(value, kind) or isinstance(value, bool):
                    READING.refuse(where, f"{key}: is {kind_of(value)}, where answers have {kind.__name__}")
            if not line["text"].startswith(line["prompt"]):
                READING.refuse(where, "text: does not begin with its prompt")
            prompt = line.get("messages", line["prompt"])
            fields = {key: value for key, value in line.items() if key not in (*RESULT_KEYS, "messages")}
            asked = found.setdefault(repr((prompt, sorted(fields.items(), key=str))), Asked(prompt))
            text = line["text"][len(line["prompt"]) :]
            asked.attempts.append(
                Attempt(prompt, text, fields, where, tokens=line["tokens"], ended=ended_itself(line["ended"]))
            )
            asked.checkpoints.append(line["checkpoint"])
    if not found:
        READING.refuse(paths[0], "holds no answer")
    return list(found.values())
