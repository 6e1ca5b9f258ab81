"""`moelab compare`: a table in the terminal and a report in one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from moelab_tools.user_path import USER_PATH, finite

SHOWN = 2048  # tokens of a trace: a report of several stays small


@click.command("compare")
@click.argument("run", nargs=-1, required=True, type=USER_PATH, metavar="RUN...")
@click.option("--output", type=USER_PATH, default=Path("comparison"), show_default=True,
              help="Folder for report.html and comparison.json; an older report there is replaced.")  # fmt: skip
@click.option(
    "--baseline", metavar="RUN", help="What the others are compared with. Default: the lowest, picked by looking."
)
@click.option("--json", "json_file", type=USER_PATH, help="Write comparison.json to this file too.")
@click.option("--practical", type=click.FloatRange(0, 100), callback=finite, default=0.1, show_default=True,
              metavar="PERCENT", help="Of the loss: a smaller difference is called negligible.")  # fmt: skip
@click.option(
    "--screening",
    is_flag=True,
    help="Pool the noise of three or more variants: finer with two or three seeds, but it assumes like noise.",
)
@click.option("--best", is_flag=True, help="The lowest evaluation of each run, not the last; too low by chance.")
@click.option("--routes", type=USER_PATH, multiple=True, metavar="TRACE",
              help="Show a trace (`moelab trace`) in the report as coloured text; may be given again.")  # fmt: skip
@click.option("--routes-tokenizer", metavar="SPEC",
              help="Of the traces: bytes, a run, or a tokenizer.json. Default: bytes.")  # fmt: skip
@click.option("--allow-different-data", is_flag=True, help="Go on though data, tokenizer or held-out text differ.")
def command(
    run: tuple[Path, ...],
    output: Path,
    baseline: str | None,
    json_file: Path | None,
    practical: float,
    screening: bool,
    best: bool,
    routes: tuple[Path, ...],
    routes_tokenizer: str | None,
    allow_different_data: bool,
) -> None:
    """Compare runs: which is better, by how much, and how sure.

    Prints a table and writes a report with curves. Runs that differ only in their seeds are taken together; better
    and worse take three pairs of equal seeds, whichever runs they are. Refuses runs with different data, tokenizer or
    held-out documents.

    \b
    Example:
      moelab compare runs/dense runs/moe --baseline runs/dense --output report
      moelab compare runs/moe_seed* runs/dense_seed* --baseline dense
      moelab compare runs/moe runs/other --routes traces/moe --routes traces/other
    """
    from moelab.atomic import check_output
    from moelab.errors import ConfigError
    from moelab_tools.compare.comparison import compare
    from moelab_tools.compare.endings import at_best
    from moelab_tools.compare.report import RoutesPage, check_report, write_json, write_report
    from moelab_tools.compare.runs import read_runs
    from moelab_tools.compare.table import print_comparison
    from moelab_tools.routes.view import view_of
    from moelab_tools.terminal import make_console

    check_report(output, "--output")
    if json_file is not None:
        check_output(json_file, "--json", file=True)
        if json_file.resolve() in (output.resolve(), *output.resolve().parents):
            raise ConfigError(f"--json {json_file}: is the folder of the report, or above it; name a file")
    pages = [
        RoutesPage(str(one), *view_of(one, tokenizer=routes_tokenizer, tokens=SHOWN, against=None)) for one in routes
    ]
    runs = read_runs(run)
    if best:
        runs = [at_best(one) for one in runs]
    comparison = compare(runs, baseline, allow_different_data, practical=practical / 100, screening=screening)
    print_comparison(comparison, make_console())
    report = write_report(comparison, output, pages)
    if json_file is not None:
        write_json(comparison, json_file)
    click.echo(f"report: {report}")
