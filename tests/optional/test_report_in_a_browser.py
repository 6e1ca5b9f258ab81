"""The report as a browser shows it: every chart is drawn, at any width, and no request leaves the page.

MOELAB_CHROMIUM=chromium python -m pytest tests/optional -k browser
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moelab_tools.compare.comparison import compare
from moelab_tools.compare.report import write_report
from moelab_tools.compare.runs import read_runs

CHROMIUM = os.environ.get("MOELAB_CHROMIUM")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="set MOELAB_CHROMIUM to the program: tests/optional/README.md")


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """What writes run folders without training."""
    path = Path(__file__).parents[1] / "unit/tools/compare/make_runs.py"
    spec = importlib.util.spec_from_file_location("moelab_make_runs_here", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def report(make: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several variants and seeds, a dense one, one with an evil name, one that failed."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        make.write_run(folder, make.FakeRun(f"{name}_seed{seed}", router=router, seed=seed, quality=quality))
        for name, router, quality in (("dense", None, 0.0), ("moe", "softmax_topk", -0.1), ("other", "remoe", 0.02))
        for seed in range(3)
    ]
    runs.append(make.write_run(folder, make.FakeRun("<img src=x onerror=alert(1)>", router="top_p", quality=0.3)))
    runs.append(make.write_run(folder, make.FakeRun("lost", router="hash", status="failed", steps=100, planned=300)))
    return write_report(compare(read_runs(runs), "dense"), folder / "report")


def shown(report: Path, width: int, profile: Path) -> tuple[str, str]:
    """(the page's elements after its scripts ran, what the browser said)."""
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom",
         "--virtual-time-budget=8000", "--enable-logging=stderr", f"--window-size={width},900", report.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return done.stdout, done.stderr


@pytest.mark.parametrize("width", [1440, 768, 390])
def test_every_chart_is_drawn_and_nothing_complains(report: Path, tmp_path: Path, width: int) -> None:
    page, said = shown(report, width, tmp_path)
    places = re.findall(r'<div class="plot" id="([^"]+)">(.{0,40})', page, re.DOTALL)
    assert len(places) > 15
    for name, begins in places:
        assert begins.startswith(("<svg", '<div class="cells-grid"')), name
    assert "can't be drawn" not in page.split("<script>")[0]
    assert "<img" not in page.split("<script>")[0]
    console = [line for line in said.splitlines() if "CONSOLE" in line]
    assert not console


@pytest.mark.parametrize("quality", [-0.1, 0.1])
def test_a_difference_without_an_interval_is_a_dot_where_the_axis_holds_it(
    make: ModuleType, tmp_path: Path, quality: float
) -> None:
    """A document a domain: nothing tells how sure a domain's difference is, and all of them lie on one side of 0."""
    documents = len(make.DOMAINS)
    runs = [
        make.write_run(tmp_path, make.FakeRun(f"{name}_seed{seed}", seed=seed, quality=worse, documents=documents))
        for name, worse in (("one", 0.0), ("other", quality))
        for seed in range(3)
    ]
    page, _ = shown(write_report(compare(read_runs(runs), "one"), tmp_path / "report"), 1440, tmp_path / "profile")
    chart = re.search(r'<div class="plot" id="domains-\d+">(.*?)</svg>', page, re.DOTALL)
    assert chart is not None and chart[1].count("<circle") == documents
    assert "further" not in chart[1]
    assert "1 document<" in page


def test_a_curve_of_one_point_is_a_dot(make: ModuleType, tmp_path: Path) -> None:
    """Of a run that logged once."""
    runs = [
        make.write_run(tmp_path, make.FakeRun(f"{name}_seed{seed}", seed=seed, steps=5, eval_every=0))
        for name in ("one", "other")
        for seed in range(3)
    ]
    page, _ = shown(write_report(compare(read_runs(runs), "one"), tmp_path / "report"), 1440, tmp_path / "profile")
    chart = re.search(r'<div class="plot" id="train-lm_loss-tokens">(.*?)</svg>', page, re.DOTALL)
    assert chart is not None and len(re.findall(r'<circle[^>]* r="2.6"', chart[1])) == 2
