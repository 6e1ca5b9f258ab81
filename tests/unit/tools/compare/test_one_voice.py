"""Sentences, table, report, JSON and TensorBoard say the same words about the same runs, and nothing else says more."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moelab_tools.compare import sentences, wording
from moelab_tools.compare.board import board_text
from moelab_tools.compare.budgets import AXES
from moelab_tools.compare.charts import Cast
from moelab_tools.compare.comparison import Comparison, compare
from moelab_tools.compare.forest import BAD, GOOD, OPEN, forest
from moelab_tools.compare.report import render, write_json, write_report
from moelab_tools.compare.runs import read_runs
from moelab_tools.compare.table import print_comparison
from moelab_tools.compare.verdict import Verdict
from moelab_tools.compare.wording import APART

MakeRun = Callable[..., Path]


def printed(comparison: Comparison, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), no_color=True)
    print_comparison(comparison, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.fixture(scope="module")
def comparison(make_shared_run: MakeRun) -> Comparison:
    """Better, worse, not resolved, one seed, a lost seed and a lost run, against a named baseline."""
    make, paths = make_shared_run, []
    for seed in range(4):
        paths.append(make(f"base_seed{seed}", seed=seed, router=None, flops_per_token=1.6e6))
        paths.append(make(f"lower_seed{seed}", seed=seed, quality=-0.1))
        paths.append(make(f"higher_seed{seed}", seed=seed, router="top_p", quality=0.1))
        lost = {"status": "failed", "steps": 100, "planned": 300} if seed == 3 else {}
        paths.append(make(f"same_seed{seed}", seed=seed, router="remoe", wobble=0.02, **lost))
    paths.append(make("single", router="switch"))
    paths.append(make("lost", router="hash", status="failed", steps=50))
    return compare(read_runs(paths), "base")


@pytest.fixture(scope="module")
def page(comparison: Comparison) -> str:
    return render(comparison)


@pytest.fixture(scope="module")
def numbers(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("numbers") / "numbers.json"
    write_json(comparison, path)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


WORDS = {"lower": "better", "higher": "worse", "same": "not resolved", "single": "one seed", "lost": "failed",
         "base": "baseline"}  # fmt: skip


@pytest.mark.parametrize(("name", "low", "high"), [("higher", -0.01, 0.3), ("same", 0.01, 0.3)])
def test_every_form_marks_a_word_that_its_interval_does_not_say(
    comparison: Comparison, tmp_path: Path, name: str, low: float, high: float
) -> None:
    lines = [
        replace(line, difference=replace(line.difference, low=low, high=high))  # type: ignore[type-var]
        if line.name == name
        else replace(line, at_equal={})
        for line in comparison.lines
    ]
    apart = replace(comparison, lines=lines)
    write_json(apart, tmp_path / "numbers.json")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert [one["name"] for one in numbers["variants"] if (one["difference"] or {}).get("apart")] == [name]
    marked = f"{WORDS[name]} †"
    for text in (printed(apart, 200), html.unescape(render(apart)), board_text(apart)):
        assert marked in text
        assert "† the word is Holm's" in " ".join(text.split())
    for text in (printed(comparison, 200), render(comparison), board_text(comparison)):
        assert "†" not in text


def test_every_form_has_the_same_word_for_each_variant(
    comparison: Comparison, page: str, numbers: dict[str, Any]
) -> None:
    assert {line.name: line.verdict for line in comparison.lines} == WORDS
    variants = {one["name"]: one for one in numbers["variants"]}
    assert {name: one["verdict"] for name, one in variants.items()} == WORDS
    board, text = board_text(comparison), printed(comparison, 200)
    table = page[page.index('id="table"') : page.index('id="budgets"')]
    for line in comparison.lines:
        row = next(row for row in table.split("<tr>") if f"<strong>{line.name}</strong>" in row)
        assert f">{line.verdict}" in row, line.name
        cells = next(row for row in board.splitlines() if row.startswith(f"| {line.name} |")).split(" | ")
        assert cells[3].replace("\\", "") == line.verdict
        shown = text[re.search(rf"^ {line.name} ", text, re.MULTILINE).start() :].split("───")[0]  # type: ignore[union-attr]
        assert line.verdict in shown
        for axis, found in line.at_equal.items():
            assert variants[line.name]["at_equal"][axis]["verdict"] == found.verdict
            place = 4 + AXES.index(axis)
            assert found.verdict in cells[place]
            assert found.verdict in shown


def test_every_form_has_the_same_sentences(comparison: Comparison, page: str, numbers: dict[str, Any]) -> None:
    board, text, told = board_text(comparison), printed(comparison, 80), numbers["sentences"]
    assert told == sentences.everything(comparison)
    for sentence in told:
        assert sentence in text
        assert sentence in html.unescape(page)
        assert sentence in re.sub(r"\\(.)", r"\1", board)
    for warning in comparison.warnings:
        assert warning in text
        assert warning in html.unescape(page)
        assert warning in re.sub(r"\\(.)", r"\1", board)
    assert comparison.warnings == numbers["warnings"]
    assert any("lower is better than base" in sentence for sentence in told)
    assert any("higher is worse than base" in sentence for sentence in told)


def test_a_lost_seed_is_told_everywhere_and_its_variant_is_judged_by_the_others(
    comparison: Comparison, page: str
) -> None:
    line = next(line for line in comparison.lines if line.name == "same")
    assert (line.counted, line.difference.pairs) == (3, 3)  # type: ignore[union-attr]
    (told,) = [remark for remark in sentences.remarks(comparison) if remark.startswith("same: 1 of 4 runs")]
    for form in (html.unescape(page), board_text(comparison).replace("\\", ""), printed(comparison, 80)):
        assert told in form


def test_the_first_chart_shows_every_difference_in_the_colour_of_its_word(comparison: Comparison, page: str) -> None:
    chart = forest(comparison, Cast.of(comparison))
    assert chart is not None
    rows = {row["name"]: row for row in chart.data["rows"]}
    assert {name: row["tone"] for name, row in rows.items()} == {
        "lower": GOOD, "same": OPEN, "single": OPEN, "higher": BAD
    }  # fmt: skip
    for line in comparison.lines:
        if line.name in rows:
            assert rows[line.name]["word"] == line.verdict
            assert rows[line.name]["text"].startswith(f"{line.difference.difference:+.4f}".replace("-", "−"))
    assert page.index('id="forest"') < page.index('id="table"')


def test_the_card_is_green_only_for_a_verdict(make_run: MakeRun, page: str) -> None:
    assert '<div class="verdicts resolved">' in page
    one_seed = compare(read_runs([make_run("a"), make_run("b", router="top_p", quality=0.5)]))
    assert '<div class="verdicts">' in render(one_seed)
    apart = [make_run("c"), make_run("d", router="top_p", fingerprint="sha256:bbbb")]
    assert '<div class="verdicts refused">' in render(compare(read_runs(apart), allow_different_data=True))


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_width_breaks_a_name_or_a_number(comparison: Comparison, width: int) -> None:
    text = printed(comparison, width)
    for line in comparison.lines:
        assert re.search(rf"^ {line.name} ", text, re.MULTILINE), line.name
        assert f"{line.score:.4f}" in text
        if line.difference and width > 60:
            assert f"[{line.difference.low:+.4f}, {line.difference.high:+.4f}]".replace("-", "−") in text
    assert "…" not in text


@pytest.mark.parametrize("width", [40, 50, 60, 80])
def test_no_width_loses_a_mark_beside_a_word_or_a_number(comparison: Comparison, width: int) -> None:
    def marked(found: Verdict | None) -> Any:
        if found is None or found.low is None:
            return found
        return replace(found, low=-0.01 if found.verdict in ("better", "worse") else 0.01, high=0.3)

    lines = [
        replace(
            line,
            difference=marked(line.difference),
            at_equal={axis: marked(found) for axis, found in line.at_equal.items()},
        )
        for line in comparison.lines
    ]
    text = printed(replace(comparison, lines=lines), width)
    table = text[: text.index("what they are")]
    found = [one for line in lines for one in (line.difference, *line.at_equal.values()) if one is not None]
    assert table.count(APART) == sum(one.apart for one in found) > 6
    for line in lines:
        if line.difference and line.difference.apart:
            assert wording.signed(line.difference.difference or 0.0) in table
    assert all(len(shown) <= width for shown in table.splitlines())


def test_what_a_difference_took_stands_beside_it(comparison: Comparison) -> None:
    """The baseline is dense and spends 0.8 of the FLOPs; the same tokens and seconds."""
    line = next(line for line in comparison.lines if line.name == "lower")
    base = next(line for line in comparison.lines if line.name == "base")
    at_flops = line.at_equal["flops"]
    assert sentences.footing(line, base) == (
        f"It took 1.25 × the FLOPs of base; at equal FLOPs it is {abs(at_flops.difference):.4f} "
        f"{'lower' if at_flops.difference < 0 else 'higher'} ({at_flops.verdict})."
    )
    assert sentences.footing(line, line) == ""
    assert sentences.footing(line, base) in " ".join(sentences.headlines(comparison))


def test_the_report_shows_samples_side_by_side_and_runs_nothing_in_them(make_run: MakeRun, tmp_path: Path) -> None:
    paths = [make_run("a"), make_run("b"), make_run("none")]
    evil = {"prompt": "def ", "text": "def <script>alert(1)</script>\x1b[2J\u202e", "step": 300, "seed": 0}
    (paths[1] / "evaluation_samples.jsonl").write_text(json.dumps(evil) + "\n")
    (paths[2] / "evaluation_samples.jsonl").unlink()
    write_report(compare(read_runs(paths)), tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    part = page[page.index('id="samples"') : page.index('id="config"')]
    assert part.count("<details") == 2
    assert part.index("<strong>b</strong>") < part.index("<code>The </code>")
    assert part.count("<strong>a</strong>") == 2
    assert "<pre>def a</pre>" in part
    assert "&lt;script&gt;alert(1)" in part
    assert "<script>alert(1)" not in page
    assert "\\x1b[2J\\u202e" in part


def test_tensorboard_gets_the_verdicts_once(comparison: Comparison, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):
        write_report(comparison, tmp_path)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("verdicts")
    assert event.tensor_proto.string_val[0].decode() == board_text(comparison)


def test_names_mean_nothing_to_markdown(make_run: MakeRun) -> None:
    path = make_run("plain")
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"name": "a|b](http://x)<b>"}))
    assert "a\\|b\\](http://x)\\<b\\>" in board_text(compare(read_runs([path])))


def test_what_more_seeds_can_do_is_said_with_what_they_cannot(comparison: Comparison) -> None:
    """A smaller difference takes so many pairs, or the text is the limit: then it says where seeds end."""
    line = next(line for line in comparison.lines if line.name == "lower")
    found = line.difference
    assert found is not None and found.could_have_seen is not None and found.seen_at_best is not None
    assert found.seen_at_best < found.could_have_seen
    few = replace(found, could_have_seen=0.0064, smaller=0.002, seeds_for_smaller=7, seen_at_best=0.001)
    assert sentences.could_have_seen(few, 1.0) == "With 4 pairs it could have seen 0.64 %; for 0.2 % it needs 7."
    text = replace(few, seeds_for_smaller=None, seen_at_best=0.0058)
    assert sentences.could_have_seen(text, 1.0) == (
        "With 4 pairs it could have seen 0.64 %; more seeds would bring that to 0.58 % at best: the rest is the choice "
        "of held-out text (evaluation.sequences)."
    )
    many = replace(few, seeds_for_smaller=None)
    assert sentences.could_have_seen(many, 1.0).endswith("for 0.2 % it needs more than 200.")
