"""What compare says of runs whose routers learnt nothing: no word that ranks, and the reason wherever there is one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moelab.alarms import LEARNT_NOTHING
from moelab.errors import UserError
from moelab_tools.compare.board import board_text
from moelab_tools.compare.comparison import Comparison, compare
from moelab_tools.compare.report import render, write_json
from moelab_tools.compare.runs import read_runs
from moelab_tools.compare.sentences import headlines
from moelab_tools.compare.table import print_comparison

MakeRun = Callable[..., Path]
UNTAUGHT = {
    "name": "untaught", "layer": 1, "value": 1e-6, "threshold": 0.01, "advice": "take more experts",
    "first_step": 0, "last_step": 300, "worst": 1e-7, "on": True, "nothing_learnt": True,
}  # fmt: skip
DEAD = UNTAUGHT | {"name": "dead_experts", "value": 0.4, "threshold": 0.25, "worst": 0.5, "first_step": 100}


def with_summary(folder: Path, **keys: Any) -> Path:
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 3, "alarms": [], **keys}))
    return folder


@pytest.fixture
def variants(make_run: MakeRun) -> Callable[..., list[Path]]:
    """Three seeds of `good` and of `bad`, which is far better; keys go into the summaries of `bad`."""

    def make(**keys: Any) -> list[Path]:
        good = [with_summary(make_run(f"good_seed{seed}", seed=seed, quality=0.3)) for seed in range(3)]
        bad = [with_summary(make_run(f"bad_seed{seed}", seed=seed, router="switch"), **keys) for seed in range(3)]
        return good + bad

    return make


def everything(comparison: Comparison, folder: Path) -> dict[str, str]:
    terminal = io.StringIO()
    print_comparison(comparison, Console(file=terminal, width=160))
    write_json(comparison, folder / "comparison.json")
    page = render(comparison)
    body = page[: page.index("<script>")]
    return {"text": terminal.getvalue(), "report": body, "json": (folder / "comparison.json").read_text()}


def words(comparison: Comparison) -> dict[str, str]:
    return {line.name: line.verdict for line in comparison.lines}


@pytest.mark.parametrize(
    ("name", "baseline"),
    [*((name, "good") for name in sorted(LEARNT_NOTHING)), ("untaught", "bad"), ("untaught", None)],
)
def test_a_run_whose_router_learnt_nothing_is_never_called_better(
    variants: Callable[..., list[Path]], tmp_path: Path, name: str, baseline: str | None
) -> None:
    folders = variants(alarms=[UNTAUGHT | {"name": name}])
    comparison = compare(read_runs(folders), baseline)
    assert words(comparison)["bad"] == "withheld"
    assert not {"better", "best", "worse"} & set(words(comparison).values())
    assert all(v.verdict not in ("better", "worse") for line in comparison.lines for v in line.at_equal.values())
    for where, told in everything(comparison, tmp_path).items():
        assert f"the router of bad has learnt nothing ({name} in layer 1 of 3 of 3 runs)" in " ".join(told.split()), (
            where
        )


@pytest.mark.parametrize("untaught", ["variant", "baseline"])
def test_that_a_router_without_teaching_is_worse_is_said(
    variants: Callable[..., list[Path]], tmp_path: Path, untaught: str
) -> None:
    folders = variants()  # "bad" is lower than "good"
    for folder in folders[:3]:
        with_summary(folder, alarms=[UNTAUGHT])
    named, other, word = ("bad", "good", "worse") if untaught == "variant" else ("good", "bad", "better")
    comparison = compare(read_runs(folders), named)
    assert words(comparison)[other] == word
    for where, told in everything(comparison, tmp_path).items():
        assert "Not to be called better: the router of good has learnt nothing" in " ".join(told.split()), where


def test_without_the_alarm_the_same_runs_get_their_words(variants: Callable[..., list[Path]]) -> None:
    assert words(compare(read_runs(variants()), "good")) == {"bad": "better", "good": "baseline"}


@pytest.mark.parametrize("entry", [DEAD, UNTAUGHT | {"on": False}, UNTAUGHT | {"name": "of_a_later_version"}])
def test_an_alarm_that_is_over_or_of_another_kind_is_shown_and_withholds_nothing(
    variants: Callable[..., list[Path]], tmp_path: Path, entry: dict[str, Any]
) -> None:
    comparison = compare(read_runs(variants(alarms=[entry])), "good")
    assert words(comparison)["bad"] == "better"
    for where, told in everything(comparison, tmp_path).items():
        assert f"alarm: bad, 3 of 3 runs: {entry['name']}, layer 1, from step" in " ".join(told.split()), where


def test_a_single_run_that_is_lowest_is_said_to_be_no_verdict(make_run: MakeRun, tmp_path: Path) -> None:
    good = with_summary(make_run("good", quality=0.3))
    bad = with_summary(make_run("bad", router="switch"), alarms=[UNTAUGHT])
    comparison = compare(read_runs([good, bad]))
    assert comparison.baseline == "good"  # found by looking, among those that learnt
    assert words(comparison) == {"bad": "one seed", "good": "baseline"}
    told = everything(comparison, tmp_path)["text"]
    assert "bad has the lowest held-out loss" in told
    assert "and that is no verdict: the router of bad has learnt nothing (untaught in layer 1)" in told
    assert "alarm: untaught" in told


def test_a_seed_of_several_is_enough(variants: Callable[..., list[Path]]) -> None:
    folders = variants()
    with_summary(folders[-1], alarms=[UNTAUGHT])
    (line,) = [one for one in compare(read_runs(folders), "good").lines if one.name == "bad"]
    assert (line.verdict, line.untaught) == (
        "withheld", "the router of bad has learnt nothing (untaught in layer 1 of 1 of 3 runs)"
    )  # fmt: skip


def test_a_router_by_design_is_a_fact_and_gets_its_word(variants: Callable[..., list[Path]], tmp_path: Path) -> None:
    comparison = compare(read_runs(variants(fixed_routers={"0": "Hash", "10": "Hash", "2": "Hash"})), "good")
    assert words(comparison)["bad"] == "better"
    for where, told in everything(comparison, tmp_path).items():
        assert "bad routes by a fixed rule in layers 0, 2, 10 (Hash): nothing to learn, by design" in told, where


@pytest.mark.parametrize("baseline", ["good", "bad", None])
def test_a_router_that_the_config_froze_gets_its_words_with_that_one(
    variants: Callable[..., list[Path]], tmp_path: Path, baseline: str | None
) -> None:
    """Wherever a word stands: in the sentences, in the row, at equal budgets, in the board's table."""
    kept = "router frozen by config (train.freeze)"
    comparison = compare(read_runs(variants(frozen_routers={"0": "train.freeze", "1": "train.freeze"})), baseline)
    told = " ".join(headlines(comparison))
    assert f"bad ({kept}) " in told
    assert "bad is better" not in told
    assert "than bad:" not in told
    (frozen,) = [line for line in comparison.lines if line.name == "bad"]
    assert frozen.frozen == kept
    for where, text in everything(comparison, tmp_path).items():
        said = " ".join(text.replace("│", " ").split())
        assert kept in said or (where == "text" and "router frozen by" in said), where
    assert f"{frozen.verdict}, {kept}" in board_text(comparison)
    assert f"{frozen.verdict}, {kept}" in render(comparison)
    others = [line for line in comparison.lines if line.name != "bad"]
    assert all(line.frozen is None for line in others)


def test_runs_that_kept_no_alarms_are_said_to_be_unknown(make_run: MakeRun) -> None:
    old, new, dense = make_run("old"), with_summary(make_run("new")), make_run("dense", router=None)
    told = " ".join(compare(read_runs([old, new, dense])).warnings)
    assert "old: trained by a version that kept no alarms" in told
    assert "new: trained by" not in told
    assert "dense" not in told.split("trained by")[0].split(". ")[-1]


@pytest.mark.parametrize(
    "alarms", [3, [3], [{}], [UNTAUGHT | {"worst": "high"}], [UNTAUGHT | {"on": 1}], [UNTAUGHT | {"layer": "x"}], None]
)
def test_alarms_that_are_none_are_refused_with_the_file(make_run: MakeRun, alarms: Any) -> None:
    run = with_summary(make_run("a"), alarms=alarms)
    with pytest.raises(UserError, match=r"summary.json: `alarms` are not what moelab writes"):
        compare(read_runs([run, with_summary(make_run("b"))]))
