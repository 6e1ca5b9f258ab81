"""The terminal's table: one variant a row, best first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from moelab_tools.compare import sentences, wording
from moelab_tools.compare.budgets import AXES
from moelab_tools.compare.comparison import Comparison, Line

STYLES = {"better": "green", "best": "green", "worse": "red", "failed": "bold red", "withheld": "bold yellow"}
LONGEST_NAME = 32  # characters: a longer one is folded
ROOM = 1000  # characters: enough for any table, to measure it in


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Conflicts and seen text in bold first, then the table, the verdicts, what they rest on, and the warnings."""
    unbroken = not console.is_terminal  # a terminal's lines break between words
    for conflict in comparison.conflicts:
        console.print(f"[bold red]NOT COMPARABLE: {escape(conflict)}[/]", highlight=False, soft_wrap=unbroken)
    for told in comparison.seen:
        console.print(f"[bold red]{escape(told)}[/]", highlight=False, soft_wrap=unbroken)
    for table in _tables(comparison, console.width):
        console.print(table)
    for told in (*sentences.headlines(comparison), *wording.budgets(comparison), *sentences.multipliers(comparison)):
        console.print(escape(told), highlight=False, soft_wrap=unbroken)
    for told in sentences.remarks(comparison):
        console.print(f"[bold]{escape(told)}[/]", highlight=False, soft_wrap=unbroken)
    for told in sentences.alarms(comparison):
        console.print(f"[yellow]{escape(told)}[/]", highlight=False, soft_wrap=unbroken)
    for told in sentences.what_intervals_cover(comparison):
        console.print(f"[dim]{escape(told)}[/]", highlight=False, soft_wrap=unbroken)
    for warning in comparison.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=unbroken)


@dataclass(frozen=True)
class _Column:
    """A heading and what it says of each variant."""

    heading: str
    cell: Callable[[Comparison, Line], str]
    right: bool = True
    fold: bool = False


def _tables(comparison: Comparison, width: int) -> list[Table]:
    """One table, or as many below each other as it takes not to break names and numbers.

    A column that is too wide alone is wrapped: cut off it would lose a word's mark.
    """
    what = f"difference in {comparison.measure.name} against {escape(comparison.baseline or wording.MISSING)}"
    whole = _table(comparison, [*VERDICT, *COST], what)
    if _width(whole) <= width:
        return [whole]
    found = []
    for title, columns in ((what, VERDICT), ("what they are and what they took", COST)):
        fitting: list[_Column] = []
        for column in columns:
            if fitting and _width(_table(comparison, [*fitting, column], title)) > width:
                found.append((title, fitting))
                fitting = []
            fitting = [*fitting, column]
        found.append((title, fitting))
    tables = [_table(comparison, columns, title) for title, columns in found]
    return [
        table if _width(table) <= width else _table(comparison, columns, title, wrap=True)
        for table, (title, columns) in zip(tables, found, strict=True)
    ]


def _width(table: Table) -> int:
    wide = Console(width=ROOM)
    return Measurement.get(wide, wide.options, table).minimum


def _table(comparison: Comparison, columns: Sequence[_Column], title: str, *, wrap: bool = False) -> Table:
    table = Table(box=box.HORIZONTALS, show_lines=True, pad_edge=False, title=title)
    longest = max(len(line.name) for line in comparison.lines)
    table.add_column("run", overflow="fold", no_wrap=longest <= LONGEST_NAME and not wrap)
    rows = [[column.cell(comparison, line) for column in columns] for line in comparison.lines]
    for place, column in enumerate(columns):
        heading = column.heading.format(unit=comparison.measure.name.replace(" per ", "/"))
        justify: JustifyMethod = "right" if column.right else "left"
        whole = not (column.fold or wrap)
        # rich would measure the longest word of what it does not wrap, and cut off what stands behind it
        least = max(_longest_line(text) for text in (heading, *(row[place] for row in rows))) if whole else None
        table.add_column(heading, justify=justify, no_wrap=whole, overflow="fold", min_width=least)
    for line, row in zip(comparison.lines, rows, strict=True):
        table.add_row(_name(comparison, line), *row)
    return table


def _longest_line(markup: str) -> int:
    return max((cell_len(line) for line in Text.from_markup(markup).plain.splitlines()), default=0)


def _name(comparison: Comparison, line: Line) -> str:
    unfinished = "" if line.status == "finished" else f"\n[bold red]{escape(line.status.upper())}[/]"
    seeds = f"\n[dim]{escape(told)}[/]" if (told := _seeds(line)) else ""
    alarms = "".join(f"\n[bold yellow]{escape(told)}[/]" for told in wording.alarms(comparison, line))
    return f"[bold]{escape(line.name)}[/]{seeds}{unfinished}{alarms}"


def _loss(comparison: Comparison, line: Line) -> str:
    spread = f"\n[dim]± {line.score_sd:.4f}[/]" if line.score_sd is not None else ""
    return f"[bold]{wording.loss(line.score)}[/]{spread}"


def _difference(comparison: Comparison, line: Line) -> str:
    gap, said = line.difference, wording.word(line, line.verdict, line.difference)
    word = f"[{STYLES.get(line.verdict, 'bold')}]{escape(said)}[/]"
    if gap is None or gap.difference is None:
        return word
    interval = ""
    if gap.low is not None and gap.high is not None:
        interval = f"\n[{wording.signed(gap.low)}, {wording.signed(gap.high)}]"
    pairs = f", {gap.pairs} {'pairs' if gap.paired else 'seeds each'}" if gap.pairs > 1 else ""
    return f"{escape(wording.signed(gap.difference) + interval)}\n{word}[dim]{pairs}[/]"


def _at_equal(comparison: Comparison, line: Line) -> str:
    return "\n".join(escape(wording.at_equal(comparison, line, axis)) for axis in AXES)


def _size(comparison: Comparison, line: Line) -> str:
    return f"{wording.amount(line.parameters_total)}\n[dim]{wording.active(line)}[/]"


def _spent(comparison: Comparison, line: Line) -> str:
    return f"{wording.amount(line.tokens)}\n[dim]{wording.flops(line.flops)}[/]\n{line.seconds:,.0f} s"


def _speed(comparison: Comparison, line: Line) -> str:
    return f"{wording.amount(line.tokens_per_second)}\n{wording.decimal(line.max_violation)}"


VERDICT = (
    _Column("{unit}", _loss),
    _Column("difference\n95 % interval\nverdict", _difference, right=False),
    _Column("at equal tokens\nFLOPs\nseconds", _at_equal, right=False),
)
COST = (
    _Column("layout · router · balance", lambda _, line: escape(wording.components(line)), right=False, fold=True),
    _Column("parameters\nactive", _size),
    _Column("tokens\nFLOPs\nseconds", _spent),
    _Column("tokens/s\nMaxVio", _speed),
    _Column("nats/\ntoken", lambda _, line: wording.loss(line.eval_loss)),
)


def _seeds(line: Line) -> str:
    """How many of its runs count."""
    if len(line.runs) == 1:
        return ""
    counted = f"{line.counted} of " if line.counted != len(line.runs) else ""
    return f"{counted}{len(line.runs)} seeds"
