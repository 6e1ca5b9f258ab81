"""The runs behind the variants, one a row: their seeds, what each ended with, and whether it counts."""

from __future__ import annotations

from dataclasses import dataclass

from moelab_tools.compare import wording
from moelab_tools.compare.comparison import Comparison, Line
from moelab_tools.compare.runs import Run
from moelab_tools.compare.variants import score

# What a run may repeat with another seed, as the column is called; a column that no run fills is left out.
PARTS = {"seed": "seed", "order": "order of reading", "source": "source", "conversion": "conversion"}
FOLDED = 8  # rows from which the table is opened by hand


@dataclass(frozen=True)
class ReplicateRow:
    """One run."""

    line: Line
    run: str
    seeds: list[str]  # by column
    loss: str
    counted: str  # "yes", or why its variant's figures are not of it


@dataclass(frozen=True)
class Replicates:
    """All of them; no rows where every variant is one run, which the tables above tell whole."""

    columns: list[str]
    rows: list[ReplicateRow]

    @property
    def folded(self) -> bool:
        return len(self.rows) > FOLDED


def replicates(comparison: Comparison) -> Replicates:
    """In the order of the lines; of each the runs in theirs."""
    by_name = {run.name: run for run in comparison.runs}
    seeds = {name: _seeds(run) for name, run in by_name.items()}
    parts = [part for part in PARTS if any(own[part] for own in seeds.values())]
    if all(len(line.runs) == 1 for line in comparison.lines):
        return Replicates([], [])
    rows = [
        ReplicateRow(
            line,
            name,
            [seeds[name][part] for part in parts],
            wording.loss(score(by_name[name], comparison.measure)),
            "yes" if by_name[name].finished or line.counted == len(line.runs) else f"no, {by_name[name].status}",
        )
        for line in comparison.lines
        for name in line.runs
    ]
    return Replicates([PARTS[part] for part in parts], rows)


def _seeds(run: Run) -> dict[str, str]:
    """{part: its seed in words}; the order of reading is told where it is not the seed's."""
    own = run.replicate
    return {
        "seed": own.seed,
        "order": "" if own.order == own.seed else own.order,
        "source": own.source or "",
        "conversion": own.conversion or "",
    }
