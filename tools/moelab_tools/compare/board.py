"""The verdicts in TensorBoard: the same sentences and words as everywhere else, in its Text tab."""

from __future__ import annotations

import re
from pathlib import Path

from moelab.errors import UserError
from moelab_tools.compare import sentences, wording
from moelab_tools.compare.budgets import AXES
from moelab_tools.compare.comparison import Comparison, Line


def write_board(comparison: Comparison, folder: Path) -> None:
    """An event file that TensorBoard shows where its --logdir holds `folder`; an older one there is replaced."""
    from moelab_plugins.observers._tensorboard_texts import write_texts

    try:
        write_texts(folder, {"verdicts": board_text(comparison)})
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); choose another place") from error


def board_text(comparison: Comparison) -> str:
    """Markdown: a row for each variant, what can't be compared, the sentences and the warnings."""
    told = [f"**Not comparable: {_plain(one)}**" for one in comparison.conflicts]
    told += [f"**{_plain(one)}**" for one in comparison.seen]
    told += [_plain(one) for one in sentences.everything(comparison)]
    heading = ["variant", comparison.measure.name, f"against {comparison.baseline}", "verdict"]
    heading += [f"at equal {sentences.AXIS_NAMES[axis]}" for axis in AXES]
    rows = [_row(heading), "|" + " --- |" * len(heading)]
    rows += [_row(_cells(comparison, line)) for line in comparison.lines]
    warned = [f"- {_plain(one)}" for one in comparison.warnings]
    return "\n\n".join(["\n".join(rows), *told, "\n".join(warned)])


def _cells(comparison: Comparison, line: Line) -> list[str]:
    gap = line.difference
    difference = wording.MISSING
    if gap is not None and gap.difference is not None:
        difference = f"{wording.signed(gap.difference)} ({sentences.between(gap)})"
    equal = [wording.at_equal(comparison, line, axis) for axis in AXES]
    return [line.name, wording.loss(line.score), difference, wording.word(line, line.verdict, gap), *equal]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(map(_plain, cells)) + " |"


def _plain(text: str) -> str:
    """Without what Markdown reads as its own."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)
