"""The report's charts of longer texts: a line a way, means and bands over seeds, of the newest checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moelab.errors import UserError
from moelab_tools.compare.charts import Cast
from moelab_tools.compare.comparison import compare
from moelab_tools.compare.figures import sections
from moelab_tools.compare.report import render
from moelab_tools.compare.runs import read_runs

MakeRun = Callable[..., Path]


def keep(run: Path, step: int, losses: dict[str, float]) -> None:
    ways = {
        name: [
            {
                "length": length, "times": length / 64, "loss": loss, "beyond": loss if length > 64 else None,
                "positions": {"001": loss + 1, "002-003": loss}, "drift": {}, "drift_within": {},
                "passkey": {"0": 1.0, "1": 0.0}, "drift_by_place": {"0": {"002-003": 0.2}, "1": {"002-003": 0.4}},
                "entropy": {"0": {"001": 0.0, "002-003": 1.0}, "1": {"001": 0.0, "002-003": 2.0}}, "documents": {},
            }
            for length in (64, 128)
        ]
        for name, loss in losses.items()
    }  # fmt: skip
    kept = {"format_version": 1, "trained": 64, "tokens": 1, "text": {"fingerprint": "f"}, "ways": ways}
    folder = run / "lengths" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "lengths.json").write_text(json.dumps(kept))


def test_a_line_is_a_way_and_its_band_runs_over_the_seeds(make_run: MakeRun) -> None:
    runs = [make_run(f"moe_seed{seed}", seed=seed) for seed in range(3)]
    runs += [make_run(f"dense_seed{seed}", seed=seed, router=None) for seed in range(3)]
    for seed in range(3):
        keep(runs[seed], 5, {"plain": 9.0})
        keep(runs[seed], 10, {"plain": 3.0 + seed, "yarn": 2.0})
    comparison = compare(read_runs(runs), "dense")
    found = next(one for one in sections(comparison, Cast.of(comparison)) if one.title == "Longer texts")
    assert [chart.title for chart in found.charts] == ["Loss by place"]
    data: dict[str, Any] = found.charts[0].data
    assert [line["own"]["name"] for line in data["lines"]] == ["plain", "yarn"]
    assert (data["lines"][0]["y"], data["lines"][0]["low"], data["lines"][0]["high"]) == ([5, 4], [4, 3], [6, 5])
    assert data["names"] == ["1", "2–3"]
    others = {chart.title: chart.data["lines"][0]["y"] for chart in found.more}
    assert others == {
        "Entropy of attention": [0, 1.5], "Assignments that move": [0.3], "Loss beyond the trained length": [4],
        "Keys given back": [0.5, 0.5],
    }  # fmt: skip
    page = render(comparison)
    assert "Longer texts" in page
    assert "4 more charts" in page


def test_a_report_without_such_looks_has_no_such_charts_and_a_broken_one_is_named(make_run: MakeRun) -> None:
    runs = [make_run(f"{name}_seed{seed}", seed=seed) for name in ("a", "b") for seed in range(3)]
    comparison = compare(read_runs(runs), "a")
    assert "Longer texts" not in render(comparison)
    keep(runs[0], 10, {"plain": 3.0})
    path = next(runs[0].glob("lengths/*/lengths.json"))
    path.write_text(path.read_text().replace('"loss": 3.0', '"loss": "low"'))
    with pytest.raises(UserError, match=r"lengths.json: .*loss.*must be a number"):
        render(comparison)
