"""The HTML report, which needs no network, comparison.json beside it, and the verdicts for TensorBoard's Text tab."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from moelab.atomic import write_file
from moelab.errors import UserError
from moelab_tools.compare import sentences, wording
from moelab_tools.compare.board import write_board
from moelab_tools.compare.comparison import Comparison
from moelab_tools.compare.figures import run_styles, sections
from moelab_tools.compare.forest import forest
from moelab_tools.compare.sample_texts import samples_by_prompt

REPORT, NUMBERS, BOARD = "report.html", "comparison.json", "tensorboard"


def write_report(comparison: Comparison, folder: Path) -> Path:
    """report.html, comparison.json and a folder for TensorBoard in `folder`; -> the report's path."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: can't be made ({error.strerror}); choose another folder") from error
    write_json(comparison, folder / NUMBERS)
    _write(folder / REPORT, render(comparison))
    write_board(comparison, folder / BOARD)
    return folder / REPORT


def write_json(comparison: Comparison, path: Path) -> None:
    """Valid JSON for every reader: what is not a finite number becomes null."""
    told = {"sentences": sentences.everything(comparison)}
    _write(path, json.dumps(_finite(comparison.to_json() | told), indent=2, allow_nan=False) + "\n")


def render(comparison: Comparison) -> str:
    """The page, with plotly.js inside."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from jinja2.utils import htmlsafe_json_dumps
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    charts, first = sections(comparison), forest(comparison)
    shown = [chart for section in charts for chart in section.charts] + ([first] if first else [])
    return environment.get_template("report.html.jinja").render(
        comparison=comparison,
        sections=charts,
        forest=first,
        figures=htmlsafe_json_dumps({chart.id: vars(chart) for chart in shown}, dumps=_dumps),
        samples=samples_by_prompt(comparison.runs),
        styles=run_styles(comparison),
        variant_colours={line.name: run_styles(comparison)[line.runs[0]][0] for line in comparison.lines},
        wording=wording,
        sentences=sentences,
        headlines=sentences.headlines(comparison),
        covers=sentences.what_intervals_cover(comparison),
        plotly=Markup(get_plotlyjs()),
    )


def _dumps(value: Any, **_: Any) -> str:
    """Curves hold finite numbers, a hundred runs a million of them: the slow way is for what does not."""
    try:
        return json.dumps(value, allow_nan=False)
    except (ValueError, TypeError):
        return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); choose another place") from error
