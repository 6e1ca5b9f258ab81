"""The samples of the runs' last evaluations, side by side: what each wrote to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moelab.printable import printable
from moelab.records import Record
from moelab.safe_files import Reading, json_lines
from moelab_tools.compare.runs import Run

FILE = "evaluation_samples.jsonl"
LONGEST = 100_000  # characters of a text that is read
SHOWN, MOST, ALL = 3000, 16, 200_000  # characters of a text, prompts, and characters of all, that the report shows
_READING = Reading(cure="leave this run out, remove the file, or train it again")


@dataclass(frozen=True)
class Written:
    """By one run to one prompt."""

    run: str
    text: str  # fit for a page or a terminal
    about: str  # step and seed


def samples_by_prompt(runs: Sequence[Run]) -> dict[str, list[Written]]:
    """{prompt: what each run wrote, in the order of the runs}; runs without samples have none.

    Of many runs each text is cut to its part of what the report shows.

    Raises UserError for a file that is not what `moelab train` writes.
    """
    found: dict[str, list[Written]] = {}
    shown = min(SHOWN, ALL // max(1, len(runs)))
    for run in runs:
        path = run.path / FILE
        if not path.exists():  # written by an earlier version, or killed before its end
            continue
        for where, values in json_lines(path, _READING, torn=not run.finished):
            row = Record(where, values, _READING)
            prompt, text = row.text("prompt", longest=LONGEST), row.text("text", longest=LONGEST)
            about = f"step {row.integer('step', least=0)}, seed {row.integer('seed')}"
            written = Written(run.name, printable(text, shown, keep="\n\t"), about)
            found.setdefault(printable(prompt, SHOWN, keep="\n\t"), []).append(written)
    prompts = min(MOST, max(1, ALL // max(1, shown * len(runs))))
    return dict(list(found.items())[:prompts])
