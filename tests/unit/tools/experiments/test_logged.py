"""What runs log beside their loss: means by the formula, intervals of Student's t over seeds, and how it is shown."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from moelab_tools.compare.runs import Run
from moelab_tools.experiments.logged import Logged, logged, logged_in_short, logged_section

DRIFT = ("moe/layer_00/drift", "moe/layer_01/drift")


def run(seed: int, **curves: list[float]) -> Run:
    """`curves` by names in which two underscores stand for a slash; a step each."""
    steps = max(map(len, curves.values()))
    rows = [{"step": step, "tokens": step} | {name.replace("__", "/"): ys[step] for name, ys in curves.items()
            if step < len(ys)} for step in range(steps)]  # fmt: skip
    return Run(Path(f"r{seed}"), f"r{seed}", "finished", {"seed": seed, "data": {}}, {}, rows, {})


def drifting(seed: int, end: float, other: float = 3.0) -> Run:
    return run(seed, moe__layer_00__drift=[0.0, 1.0, end], moe__layer_01__drift=[2.0, other], x=[5.0])


ENDS = {"plain": [1.0, 2.0, 4.0, 3.0], "frozen": [1.5, 2.1, 4.9, 3.6]}
RUNS = {name: [drifting(seed, end) for seed, end in enumerate(ends)] for name, ends in ENDS.items()}


def test_the_first_and_last_values_of_each_run_are_averaged_and_then_the_runs() -> None:
    found = logged(Logged([DRIFT[0], "x"], first=2, last=2), RUNS, "plain", 0.05)
    assert list(found) == [DRIFT[0], "x"]
    ends = {name: (1 + np.array(values)) / 2 for name, values in ENDS.items()}
    for name, values in ends.items():
        one = found[DRIFT[0]][name]
        assert (one["seeds"], one["names"], one["first"]) == (4, 1, 0.5)
        assert one["last"] == pytest.approx(values.mean())
        assert one["sd_over_seeds"] == pytest.approx(values.std(ddof=1))
    one, gaps = found[DRIFT[0]]["frozen"], ends["frozen"] - ends["plain"]
    half = stats.t.ppf(0.975, 3) * gaps.std(ddof=1) / math.sqrt(4)
    assert (one["difference"], one["low"], one["high"]) == pytest.approx(
        (gaps.mean(), gaps.mean() - half, gaps.mean() + half)
    )
    assert "difference" not in found[DRIFT[0]]["plain"]


def test_a_pattern_is_the_mean_of_its_names_by_run_and_stands_before_them() -> None:
    found = logged(Logged(["moe/*/drift"], last=1), RUNS, "plain", 0.05)
    assert list(found) == ["moe/*/drift", *DRIFT]
    mean, one, other = (found[name]["frozen"] for name in found)
    assert mean["names"] == 2
    for key in ("first", "last", "difference"):
        assert mean[key] == pytest.approx((one[key] + other[key]) / 2)
    gaps = (np.array(ENDS["frozen"]) - np.array(ENDS["plain"])) / 2
    half = stats.t.ppf(0.975, 3) * gaps.std(ddof=1) / math.sqrt(4)
    assert mean["high"] - mean["low"] == pytest.approx(2 * half), "of the mean, and no mean of intervals"


def test_seeds_that_log_the_same_are_as_many_as_they_are() -> None:
    """A frozen router's drift is nothing in every seed, and a share of few samples is often that of another seed."""
    runs = {"plain": [run(n, x=[end]) for n, end in enumerate((0.4, 0.6, 0.6, 1.0))],
            "frozen": [run(n, x=[0.0]) for n in range(4)]}  # fmt: skip
    one = logged(Logged(["x"]), runs, "plain", 0.05)["x"]["frozen"]
    gaps = np.array([-0.4, -0.6, -0.6, -1.0])
    half = stats.t.ppf(0.975, 3) * gaps.std(ddof=1) / math.sqrt(4)
    assert (one["difference"], one["low"], one["high"]) == pytest.approx((-0.65, -0.65 - half, -0.65 + half))


def test_runs_that_lack_a_name_are_in_no_mean_and_names_that_nobody_has_in_no_row() -> None:
    runs = RUNS | {"dense": [run(seed, x=[1.0 + seed]) for seed in range(3)]}
    found = logged(Logged(["moe/*/drift", "x", "nothing/*"]), runs, "plain", 0.05)
    assert "dense" not in found["moe/*/drift"]
    assert found["x"]["dense"]["seeds"] == 3
    assert not any(name.startswith("nothing") for name in found)
    without = logged(Logged([DRIFT[0]]), runs | {"plain": runs["dense"]}, "plain", 0.05)
    assert "difference" not in without[DRIFT[0]]["frozen"], "the baseline has no such name"


def findings(**changed: Any) -> dict[str, Any]:
    asked = Logged(["moe/*/drift", "x"], last=1)
    declared = {"logged": vars(asked), "protocol": {"error": 0.05}}
    return {
        "logged": logged(asked, RUNS, "plain", 0.05), "baseline": "plain", "declaration": {"declared": declared},
        "variants": {"plain": {}, "frozen": {}, "dense": {}},
    } | changed  # fmt: skip


def test_all_rows_are_read_and_on_the_page_those_that_were_declared() -> None:
    whole, short = logged_section(findings()), logged_in_short(findings())
    assert sum(line.startswith("| `moe/") for line in whole) == 3 * 2
    assert short[2:4] == ["| what | plain | frozen |", "|---|---|---|"]
    assert len(short) == 6
    assert short[4].startswith("| `moe/*/drift`, mean of 2 | 1.0000 → 2.7500 | 1.0000 → 3.0125, +0.2625 [")
    assert short[5] == "| `x` | 5.0000 → 5.0000 | 5.0000 → 5.0000, +0.0000 [+0.0000, +0.0000] |"
    older = findings()
    del older["logged"]["moe/*/drift"]  # as findings were before a pattern had a row
    assert logged_in_short(older)[4] == "| `moe/*/drift`, mean of 2 | 1.0000 → 2.7500 | 1.0000 → 3.0125, +0.2625 |"
    assert not logged_section(findings(logged=None))
    assert not logged_in_short(findings(logged=None))
