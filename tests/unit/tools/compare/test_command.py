"""`moelab compare` as a user meets it: table, report, exit codes."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.routes.files import write_trace
from moelab_tools.cli import run as moelab
from moelab_tools.compare.comparison import compare
from moelab_tools.compare.runs import read_runs
from moelab_tools.compare.table import print_comparison
from traced_models import traced

MakeRun = Callable[..., Path]


def test_it_prints_a_table_and_writes_a_report(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make_run(f"moe_seed{seed}", seed=seed)) for seed in range(3)]
    runs += [str(make_run(f"dense_seed{seed}", seed=seed, router=None, quality=0.1)) for seed in range(3)]
    report, extra = tmp_path / "report", tmp_path / "numbers.json"
    assert moelab(["compare", *runs, "--output", str(report), "--json", str(extra), "--baseline", "dense"]) == 0
    printed = capsys.readouterr().out
    assert "moe is better than dense: −" in printed
    assert "it covers training seeds and held-out text" in printed
    assert "With 3 pairs it could have seen" in printed
    assert "dense needs" in printed
    assert f"report: {report / 'report.html'}" in printed.replace("\n", "")
    assert json.loads(extra.read_text()) == json.loads((report / "comparison.json").read_text())
    assert sorted(path.name for path in report.iterdir()) == ["comparison.json", "report.html", "tensorboard"]


def test_the_report_needs_no_network_and_shows_every_part(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [str(make_run("moe")), str(make_run("dense", router=None)), str(make_run("lost", status="failed"))]
    assert moelab(["compare", *runs, "--output", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    own = re.sub(r"<script>// (https://d3js.org|@observablehq/plot).*?</script>", "", page, flags=re.DOTALL)
    assert len(own) < len(page) - 480_000  # the library is inside, once
    assert not re.search(r"(src|href)=\"(https?:)?//", own)
    assert "default-src 'none'" in own
    for heading in ("Final numbers", "Equal budgets", "Held-out loss by domain", "What a loss costs", "Against FLOPs",
                    "Against seconds of training", "MaxVio", "Balance by layer over time", "Expert load at the end",
                    "Throughput", "Config differences", "Data and machine", "Repeat it", "FAILED"):  # fmt: skip
        assert heading in own, heading


def test_a_trace_stands_in_the_report_in_a_frame_of_its_own(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = traced({"name": "softmax_topk"})[1]
    hostile = "</iframe><script>alert(1)</script>"
    trace = replace(trace, facts=trace.facts | {"vocab_size": 257, "tokenizer": ByteTokenizer().fingerprint})
    write_trace(replace(trace, documents=[(hostile, hostile)] * len(trace.documents)), tmp_path / "trace")
    given = [str(make_run("moe")), "--output", str(tmp_path / "report"), "--routes"]
    assert moelab(["compare", *given, str(tmp_path / "trace")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    frame = re.search(r'<iframe class="routes"[^>]*sandbox="allow-scripts" srcdoc="([^"]*)"', page)
    assert frame is not None
    assert "Do the colours mean anything beyond the token?" in html.unescape(frame[1])
    assert hostile not in page and "<script>" not in frame[1]
    assert moelab(["compare", *given, str(tmp_path / "nowhere")]) == 2
    assert "holds no trace" in capsys.readouterr().err


def test_seen_text_is_said_in_bold_and_no_chart_claims_the_contrary(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run("plain")
    claim = "have trained on"
    assert moelab(["compare", str(path), "--output", str(tmp_path / "clean")]) == 0
    assert claim in (tmp_path / "clean" / "report.html").read_text()
    summary = json.loads((path / "summary.json").read_text())
    summary["data"]["seen"] = {"source": "runs/dense", "scored": 52, "scored_trained": 16, "unknown": []}
    (path / "summary.json").write_text(json.dumps(summary))
    capsys.readouterr()
    assert moelab(["compare", str(path), "--output", str(tmp_path / "seen")]) == 0
    assert "plain: 16 of 52 held-out documents" in capsys.readouterr().out
    page = (tmp_path / "seen" / "report.html").read_text()
    assert "<li>plain: 16 of 52 held-out documents" in page
    assert claim not in page
    console = Console(force_terminal=True, width=300, file=io.StringIO())
    print_comparison(compare(read_runs([path])), console)
    assert "\x1b[1;31mplain: 16 of 52" in console.file.getvalue()  # type: ignore[attr-defined]


def test_names_are_escaped(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run("plain")
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"name": "<script>alert(1)</script>[bold]"}))
    assert moelab(["compare", str(path), "--output", str(tmp_path / "report")]) == 0
    assert "<script>alert(1)" not in (tmp_path / "report" / "report.html").read_text()


def test_incomparable_runs_exit_with_2_and_leave_nothing(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make_run("a")), str(make_run("b", fingerprint="sha256:bbbb"))]
    report = tmp_path / "report"
    assert moelab(["compare", *runs, "--output", str(report)]) == 2
    assert "can't be compared" in capsys.readouterr().err
    assert not report.exists()
    assert moelab(["compare", *runs, "--output", str(report), "--allow-different-data"]) == 0
    assert "NOT COMPARABLE" in capsys.readouterr().out
    assert "can't be compared fairly" in (report / "report.html").read_text()


def test_an_unwritable_output_is_a_user_error(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert moelab(["compare", str(make_run("a")), "--output", str(tmp_path / "file" / "report")]) == 2
    assert "choose another folder" in capsys.readouterr().err


def test_help_has_an_example_and_no_run_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert moelab(["compare", "--help"]) == 0
    assert "Example:" in capsys.readouterr().out
    assert moelab(["compare"]) == 2
