"""The terminal's table: one variant a row, best first."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moelab_tools.compare import sentences, wording
from moelab_tools.compare.budgets import AXES
from moelab_tools.compare.comparison import Comparison, Line

STYLES = {"better": "green", "best": "green", "worse": "red", "failed": "bold red"}


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Conflicts and seen text in bold first, then the table, the verdicts, what they rest on, and the warnings."""
    for conflict in comparison.conflicts:
        console.print(f"[bold red]NOT COMPARABLE: {escape(conflict)}[/]", highlight=False, soft_wrap=True)
    for told in comparison.seen:
        console.print(f"[bold red]{escape(told)}[/]", highlight=False, soft_wrap=True)
    console.print(_table(comparison))
    for told in sentences.headlines(comparison):
        console.print(escape(told), highlight=False, soft_wrap=True)
    for told in (*wording.budgets(comparison), *sentences.multipliers(comparison)):
        console.print(escape(told), highlight=False, soft_wrap=True)
    for told in sentences.remarks(comparison):
        console.print(f"[bold]{escape(told)}[/]", highlight=False, soft_wrap=True)
    for told in sentences.what_intervals_cover(comparison):
        console.print(f"[dim]{escape(told)}[/]", highlight=False, soft_wrap=True)
    for warning in comparison.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)


def _table(comparison: Comparison) -> Table:
    unit = comparison.measure.name.replace(" per ", "/")
    table = Table(
        box=box.HORIZONTALS,
        show_lines=True,
        pad_edge=False,
        title=f"difference in {comparison.measure.name} against {escape(comparison.baseline or wording.MISSING)}",
    )
    table.add_column("run\nlayout · router · balance", overflow="fold")
    for heading in ("total\nactive\ntokens\nFLOPs", f"loss\n{unit}", "at equal\ntokens\nFLOPs\nseconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("difference\n95 % interval", no_wrap=True)
    table.add_column("tokens/s\nMaxVio", justify="right", no_wrap=True)
    for line in comparison.lines:
        table.add_row(*_cells(comparison, line))
    return table


def _cells(comparison: Comparison, line: Line) -> tuple[str, ...]:
    gap = line.difference
    unfinished = "" if line.status == "finished" else f"\n[bold red]{escape(line.status.upper())}[/]"
    spread = f"\n[dim]± {line.score_sd:.4f}[/]" if line.score_sd is not None else ""
    style = STYLES.get(line.verdict, "bold")
    against = f"[{style}]{escape(line.verdict)}[/]"
    if gap and gap.difference is not None:
        interval = (
            f"\n[{wording.signed(gap.low)}, {wording.signed(gap.high)}]"
            if gap.low is not None and gap.high is not None
            else ""
        )
        pairs = f"\n[dim]{gap.pairs} pairs[/]" if gap.paired and gap.pairs > 1 else ""
        against = f"{escape(wording.signed(gap.difference) + interval)}\n{against}{pairs}"
    return (
        f"[bold]{escape(line.name)}[/]{escape(_seeds(line))}\n[dim]{escape(wording.components(line))}[/]{unfinished}",
        f"{wording.amount(line.parameters_total)}\n[dim]{wording.active(line)}[/]\n"
        f"{wording.amount(line.tokens)}\n[dim]{wording.flops(line.flops)}[/]",
        f"{wording.loss(line.eval_loss)}\n[bold]{wording.loss(line.score)}[/]{spread}",
        "\n".join(wording.at_budget(comparison, line, axis) for axis in AXES),
        against,
        f"{wording.amount(line.tokens_per_second)}\n{wording.decimal(line.max_violation)}",
    )


def _seeds(line: Line) -> str:
    """How many of its runs count."""
    if len(line.runs) == 1:
        return ""
    return (
        f" ({len(line.runs)} seeds)"
        if line.counted == len(line.runs)
        else f" ({line.counted} of {len(line.runs)} seeds)"
    )
