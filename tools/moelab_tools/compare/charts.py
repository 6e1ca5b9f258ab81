"""What a chart of the report is: data for `page/charts.js`, which draws it in the browser at the width it finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moelab.printable import printable
from moelab_tools.compare.comparison import Comparison, Line
from moelab_tools.compare.runs import Run

# After Okabe & Ito: told apart by people who see colours differently, on light and on dark ground.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6bb1", "#a89500")
PALE = "var(--pale)"  # of the variants beyond these
LONGEST_LABEL = 60  # characters


@dataclass(frozen=True)
class Chart:
    """One figure. `kind` is a function of page/charts.js; `wide` ones take a whole row."""

    id: str
    kind: str  # curves, intervals, points or cells
    title: str
    note: str
    data: dict[str, Any]
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """Charts under one heading; `more` are folded away."""

    title: str
    text: str
    charts: list[Chart] = field(default_factory=list)
    more: list[Chart] = field(default_factory=list)
    each: str = "variant"  # what one of `more` shows

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Cast:
    """The variants as the charts show them: the first few in colour and with a label, the others pale."""

    lines: list[Line]
    runs: dict[str, Run]  # by name
    colours: list[str]  # one a line

    @classmethod
    def of(cls, comparison: Comparison) -> Cast:
        """The baseline and the best of the others have colours."""
        lines, colours = comparison.lines, list(COLOURS)
        base = next((line for line in lines if line.name == comparison.baseline), None)
        chosen = [line for line in lines if line is not base][: len(COLOURS) - (base is not None)]
        shown = [line for line in lines if line is base or line in chosen]
        by_name = {line.name: colours.pop(0) for line in shown}
        return cls(lines, {run.name: run for run in comparison.runs}, [by_name.get(one.name, PALE) for one in lines])

    def counted(self, line: Line) -> list[Run]:
        """The runs that the line's figures are of."""
        runs = [self.runs[name] for name in line.runs]
        return [run for run in runs if run.finished] or runs

    def is_main(self, place: int) -> bool:
        return self.colours[place] != PALE

    @property
    def all_shown(self) -> bool:
        return PALE not in self.colours

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"name": label(line.name), "colour": colour, "main": colour != PALE}
            for line, colour in zip(self.lines, self.colours, strict=True)
        ]


def label(name: str) -> str:
    return printable(name, LONGEST_LABEL)
