"""The HTML report, which needs no network, comparison.json beside it, and the verdicts for TensorBoard's Text tab."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.atomic import check_output, write_output
from moelab.safe_files import Reading, read_text
from moelab_tools.compare import recipes, sentences, wording
from moelab_tools.compare.alarm_table import alarm_rows
from moelab_tools.compare.board import write_board
from moelab_tools.compare.charts import Cast, Chart
from moelab_tools.compare.comparison import Comparison
from moelab_tools.compare.figures import sections
from moelab_tools.compare.forest import at_equal_budgets, by_domain, forest
from moelab_tools.compare.replicates import replicates
from moelab_tools.compare.sample_texts import samples_by_prompt

REPORT, NUMBERS, BOARD = "report.html", "comparison.json", "tensorboard"
PAGE = Path(__file__).parent / "page"
LIBRARIES = ("d3.min.js", "plot.umd.min.js")  # in this order: page/vendor/README.md
LICENSES = ("LICENSE-d3", "LICENSE-plot")
_OURS = Reading(cure="install moelab again")


@dataclass(frozen=True)
class RoutesPage:
    """A page of text coloured by expert (`moelab view`), shown in the report in a frame of its own."""

    name: str
    page: str  # HTML
    lines: list[str]  # what its tables say, in text


def check_report(folder: Path, where: str) -> None:
    """Before the work: raises UserError where `write_report` could not write there."""
    check_output(folder, where)
    for name in (NUMBERS, REPORT):
        check_output(folder / name, where, file=True)


def write_report(comparison: Comparison, folder: Path, routes: Sequence[RoutesPage] = ()) -> Path:
    """report.html, comparison.json and a folder for TensorBoard in `folder`; -> the report's path."""
    write_json(comparison, folder / NUMBERS)
    write_output(folder / REPORT, render(comparison, routes))
    write_board(comparison, folder / BOARD)
    return folder / REPORT


def write_json(comparison: Comparison, path: Path) -> None:
    """Valid JSON for every reader: what is not a finite number becomes null."""
    told = {"sentences": sentences.everything(comparison)}
    write_output(path, json.dumps(_finite(comparison.to_json() | told), indent=2, allow_nan=False) + "\n")


def render(comparison: Comparison, routes: Sequence[RoutesPage] = ()) -> str:
    """The page, with the library that draws its charts inside."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from jinja2.utils import htmlsafe_json_dumps
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    cast = Cast.of(comparison)
    charts = _charts(comparison, cast)
    figures = {chart.id: {"kind": chart.kind} | chart.data for chart in charts.pop("all")}
    shared, apart = recipes.facts_by_value(comparison)
    by_name = {run.name: run for run in comparison.runs}
    written = samples_by_prompt([by_name[line.runs[0]] for line in comparison.lines])
    return environment.get_template("report.html.jinja").render(
        comparison=comparison,
        cast=cast,
        figures=htmlsafe_json_dumps({"variants": cast.to_json(), "figures": figures}, dumps=_dumps),
        samples=written,
        routes=routes,
        config=recipes.config_by_variant(comparison),
        facts_shared=shared,
        facts_apart=apart,
        recipes=recipes.recipes(comparison),
        comparing=recipes.comparing(comparison),
        alarm_rows=alarm_rows(comparison),
        replicates=replicates(comparison),
        wording=wording,
        sentences=sentences,
        headlines=sentences.headlines(comparison),
        covers=sentences.what_intervals_cover(comparison),
        style=Markup(_asset("report.css")),
        drawing=Markup(_asset("charts.js")),
        libraries=[Markup(_asset(f"vendor/{name}")) for name in LIBRARIES],
        licenses=[_asset(f"vendor/{name}") for name in LICENSES],
        **charts,
    )


def _charts(comparison: Comparison, cast: Cast) -> dict[str, Any]:
    """By the place where the page shows them, and `all`."""
    first, equal, (domains, more_domains) = (
        forest(comparison, cast), at_equal_budgets(comparison, cast), by_domain(comparison, cast)
    )  # fmt: skip
    parts = sections(comparison, cast)
    every: list[Chart] = [*([first] if first else []), *equal, *domains, *more_domains]
    every += [chart for part in parts for chart in (*part.charts, *part.more)]
    return {
        "forest": first, "equal": equal, "domain_charts": domains, "more_domain_charts": more_domains,
        "sections": parts, "all": every,
    }  # fmt: skip


def _asset(name: str) -> str:
    """A file of ours, or of the library in page/vendor."""
    return read_text(PAGE / name, _OURS)


def _dumps(value: Any, **_: Any) -> str:
    """Without a space: of a page with thirty runs these are tenths."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError):
        return json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
