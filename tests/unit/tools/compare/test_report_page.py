"""What the report's page holds: small, by variant, what matters first, and nothing that it does not say."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moelab_tools.compare import layers, recipes
from moelab_tools.compare.alarm_table import alarm_rows
from moelab_tools.compare.bands import band, thin
from moelab_tools.compare.charts import COLOURS, Cast
from moelab_tools.compare.comparison import Comparison, compare
from moelab_tools.compare.figures import sections
from moelab_tools.compare.forest import at_equal_budgets, by_domain, forest
from moelab_tools.compare.frontier import frontier
from moelab_tools.compare.replicates import replicates
from moelab_tools.compare.report import PAGE, render
from moelab_tools.compare.routers import RunAlarm
from moelab_tools.compare.runs import Run, read_runs

MakeRun = Callable[..., Path]
LARGEST = 1_500_000  # bytes of a report of thirty runs


@pytest.fixture(scope="module")
def comparison(make_shared_run: MakeRun) -> Comparison:
    make, paths = make_shared_run, []
    for seed in range(3):
        paths.append(make(f"dense_seed{seed}", seed=seed, router=None, flops_per_token=1.6e6))
        paths.append(make(f"moe_seed{seed}", seed=seed, quality=-0.1))
        paths.append(make(f"sigmoid_seed{seed}", seed=seed, router="sigmoid_topk", quality=0.05, steps=240))
    return compare(read_runs(paths), "dense")


@pytest.fixture(scope="module")
def cast(comparison: Comparison) -> Cast:
    return Cast.of(comparison)


@pytest.fixture(scope="module")
def page(comparison: Comparison) -> str:
    return render(comparison)


def run_of(rows: list[dict[str, float]], name: str = "run") -> Run:
    return Run(Path(name), name, "finished", {"model": {}}, {}, rows, {})


def logged(steps: list[int], values: list[float], slower: float = 1.0) -> list[dict[str, float]]:
    return [{"step": s, "tokens": 10.0 * s, "seconds": slower * s, "y": v} for s, v in zip(steps, values, strict=True)]


def test_a_band_is_the_mean_and_the_ends_of_the_seeds_step_by_step() -> None:
    runs = [run_of(logged([1, 2, 3], [4.0, 3.0, 2.0])), run_of(logged([1, 2, 3], [6.0, 3.5, 1.0], slower=3.0))]
    found = band(runs, "y", "seconds", most=100)
    assert found is not None
    assert (found.x, found.mean) == ([2.0, 4.0, 6.0], [5.0, 3.25, 1.5])
    assert (found.low, found.high, found.runs) == ([4.0, 3.0, 1.0], [6.0, 3.5, 2.0], 2)
    assert band(runs, "other", "tokens", most=100) is None


def test_a_band_ends_where_the_shortest_run_does_and_reads_between_other_steps() -> None:
    runs = [run_of(logged([1, 2, 3, 4], [4.0, 3.0, 2.0, 1.0])), run_of(logged([1, 3], [4.0, 2.0]))]
    found = band(runs, "y", "tokens", most=100)
    assert found is not None
    assert (found.x, found.low, found.high) == ([10.0, 30.0], [4.0, 2.0], [4.0, 2.0])
    sparse = band([run_of(logged([1, 3], [4.0, 2.0])), run_of(logged([1, 2], [4.0, 3.0]))], "y", "tokens", most=100)
    assert sparse is not None
    assert sparse.x == [10.0]


@pytest.mark.parametrize("points", [3, 40, 41, 999])
def test_thinning_keeps_the_first_point_and_the_mean_of_the_others(points: int) -> None:
    rows = np.random.default_rng(points).random((2, points))
    thinned = thin(rows, 40)
    assert thinned.shape[1] <= 40
    assert thinned[:, 0] == pytest.approx(rows[:, 0])
    if points > 40:
        size = math.ceil((points - 1) / 39)
        counts = np.array([1, *[min(size, points - start) for start in range(1, points, size)]])
        assert thinned @ counts == pytest.approx(rows.sum(1))


def test_the_frontier_is_what_nobody_beats_in_both(comparison: Comparison, cast: Cast) -> None:
    """dense costs least; moe is lower for more; sigmoid is higher than both, and read at fewer tokens."""
    section = frontier(comparison, cast)
    chart = next(chart for chart in section.charts if chart.id == "cost-total")
    points = {comparison.lines[point["v"]].name: point for point in chart.data["points"]}
    front = [comparison.lines[chart.data["points"][place]["v"]].name for place in chart.data["front"]]
    assert front == ["dense", "moe"]
    assert points["dense"]["x"] < points["moe"]["x"] == points["sigmoid"]["x"]
    for line in comparison.lines:
        assert points[line.name]["low"] <= points[line.name]["y"] <= points[line.name]["high"]
    assert "Not drawn, since all variants have the same: peak memory in GB." in section.text


def test_a_difference_is_what_its_domains_give_by_their_bytes(comparison: Comparison) -> None:
    """Losses are nats by bytes, so differences by domain, weighted by bytes, add up to the whole difference."""
    sizes: dict[str, int] = {}
    for one in comparison.runs[0].documents.values():
        sizes[one.domain] = sizes.get(one.domain, 0) + (one.bytes or 0)
    for line in comparison.lines:
        if line.difference is None or line.difference.difference is None:
            continue
        found = {domain: known[line.name] for domain, known in comparison.differences_by_domain.items()}
        whole = sum(sizes[domain] * one.difference for domain, one in found.items()) / sum(sizes.values())
        assert whole == pytest.approx(line.difference.difference, abs=1e-9)
        for domain, one in found.items():
            assert one.low is not None and one.high is not None
            assert one.low < one.difference < one.high
            assert one.documents == comparison.domain_documents[domain]


def test_charts_by_domain_have_no_colour_of_a_verdict(comparison: Comparison, cast: Cast) -> None:
    shown, folded = by_domain(comparison, cast)
    assert len(shown) == 2 and not folded
    assert {row["tone"] for chart in shown for row in chart.data["rows"]} == {"open"}
    assert {row["word"] for chart in shown for row in chart.data["rows"]} == {""}


def test_a_budget_that_says_what_the_end_says_has_no_chart(
    comparison: Comparison, cast: Cast, make_run: MakeRun
) -> None:
    assert [chart.id for chart in at_equal_budgets(comparison, cast)] == [
        "forest-tokens", "forest-flops", "forest-seconds"
    ]  # fmt: skip
    same = compare(read_runs([make_run("a"), make_run("b", router="top_p", quality=0.1)]), "a")
    ends = {axis: found.difference for axis, found in next(x for x in same.lines if x.name == "b").at_equal.items()}
    charts = {chart.id for chart in at_equal_budgets(same, Cast.of(same))}
    end = next(x for x in same.lines if x.name == "b").difference
    assert end is not None
    assert charts == {f"forest-{axis}" for axis, value in ends.items() if abs(value - end.difference) > 1e-9}  # type: ignore[operator]


def test_one_interval_that_goes_far_out_does_not_hide_the_others(make_run: MakeRun) -> None:
    paths = [make_run("base")]
    paths += [make_run(f"near{n}", router=f"r{n}", quality=0.01 * n) for n in range(1, 7)]
    far = compare(read_runs([*paths, make_run("lost", router="top_p", quality=9.0)]), "base")
    chart = forest(far, Cast.of(far))
    assert chart is not None
    assert chart.data["reach"][1] < 1.0
    assert {row["name"]: row["x"] for row in chart.data["rows"]}["lost"] > 5


def cells(picture: dict[str, Any], columns: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(picture["cells"]), np.uint8).reshape(-1, columns)


def test_balance_by_layer_shows_each_layer_at_its_time(cast: Cast) -> None:
    section = layers.balance_by_layer(cast)
    assert [chart.title for chart in section.charts] == ["moe", "sigmoid"]
    data = section.charts[0].data
    assert data["rows"] == ["layer 0", "layer 1", "layer 2", "layer 3"]
    runs = [run for name, run in cast.runs.items() if name.startswith("moe")]
    end = np.mean(
        [run.rows[-2 if "eval/loss" in run.rows[-1] else -1].get("moe/layer_02/max_violation", 0) for run in runs]
    )
    shown = cells(data["pictures"]["max_violation"], data["columns"])
    assert shown.shape == (4, layers.BINS)
    assert shown[2, -1] / layers.STEPS * 4 == pytest.approx(end, abs=0.15)
    assert shown[2, 0] > shown[2, -1]  # the made-up runs settle


def test_the_loads_are_those_of_the_run_with_the_fullest_expert_and_black_is_none(cast: Cast) -> None:
    section = layers.loads_at_the_end(cast)
    runs = [run for name, run in cast.runs.items() if name.startswith("moe")]
    fullest = {run.name: max(max(row) * len(row) for row in run.summary["expert_load"].values()) for run in runs}
    worst = max(fullest, key=lambda name: fullest[name])
    chart = section.charts[0]
    assert chart.note.endswith(worst) and f"{fullest[worst]:.2f} ×" in chart.note
    loads = [np.array(row) * len(row) for row in cast.runs[worst].summary["expert_load"].values()]
    shown = cells(chart.data["pictures"]["load"], chart.data["columns"])
    assert ((shown == 0) == (np.array(loads) == 0)).all()
    assert shown / layers.STEPS * layers.FAIR_SHARES == pytest.approx(np.minimum(loads, 4), abs=0.01)


def test_a_byte_of_nothing_is_only_for_nothing() -> None:
    coded = base64.b64decode(layers._bytes(np.array([[0.0, 1e-5, 2.0, 4.0, 9.0, np.nan]]), 4.0))
    assert list(coded) == [0, 1, 127, 254, 254, 255]


def test_config_differences_are_by_variant_and_what_a_dense_model_lacks_is_folded(comparison: Comparison) -> None:
    found = recipes.config_by_variant(comparison)
    names = [line.name for line in comparison.lines]
    apart = {row.key: dict(zip(names, row.values, strict=True)) for row in found.apart}
    assert apart["model.moe"] == {"dense": "none", "moe": "see below", "sigmoid": "see below"}
    assert apart["model.moe.router.name"] == {"dense": "–", "moe": "softmax_topk", "sigmoid": "sigmoid_topk"}
    assert apart["train.steps"]["sigmoid"] == "240"
    assert "model.moe.layout.num_experts" in [row.key for row in found.partly]
    assert not any(key in ("seed", "run_dir", "model.moe.layout.num_experts") for key in apart)


def test_data_and_machine_are_one_line_and_what_differs(make_run: MakeRun) -> None:
    paths = [make_run("a"), make_run("b", router="top_p")]
    for number, path in enumerate(paths):
        summary = json.loads((path / "summary.json").read_text())
        summary["plugins"] = {f"moelab_plugins.routers.r{n}": "no distribution" for n in range(70)} | {"mine": "1.2"}
        summary["data"]["manifest"] = "x" * 5000
        (path / "summary.json").write_text(json.dumps(summary | {"threads": 2 + number}))
    told = compare(read_runs(paths))
    shared, apart = recipes.facts_by_value(told)
    assert {"moelab 0.1.0", "torch 2.13.0", "fingerprint aaaa", "plugin mine 1.2"} <= set(shared)
    assert [(key, sorted(values)) for key, values in apart] == [("threads", ["2: a", "3: b"])]
    page = render(told)
    assert "no distribution" not in page and "x" * 200 not in page


def test_the_report_holds_the_commands_and_configs_that_repeat_it(comparison: Comparison, page: str) -> None:
    command = shlex.split(recipes.comparing(comparison))
    assert command[:2] == ["moelab", "compare"]
    assert command[2:11] == [str(run.path) for run in comparison.runs]
    assert command[11:] == ["--baseline", "dense"]
    assert html.escape(recipes.comparing(comparison), quote=True) in page
    strict = replace(comparison, rules=replace(comparison.rules, named=False, practical=0.002, screening=True))
    assert recipes.comparing(strict).endswith("--practical 0.2 --screening")
    picked = replace(comparison, runs=[replace(run, picked=60) for run in comparison.runs])
    assert recipes.comparing(picked).endswith("--baseline dense --best")
    for recipe, line in zip(recipes.recipes(comparison), comparison.lines, strict=True):
        assert len(recipe.commands) == len(line.runs)
        first = comparison.runs[comparison.names.index(line.runs[0])].path
        assert shlex.split(recipe.commands[0]) == [
            "moelab", "train", str(first / "config.yaml"), f"run_dir={first}_again"
        ]  # fmt: skip
        assert recipe.config == (first / "config.yaml").read_text()
        assert html.escape(recipe.config, quote=True).replace("&#x27;", "&#39;") in page


def test_alarms_of_many_layers_and_runs_are_one_row_of_a_variant(comparison: Comparison, cast: Cast) -> None:
    alarms = [
        RunAlarm(f"moe_seed{seed}", "dead", layer, 0.5, 0.25, 0.5 + layer / 100, 20 + seed, 300, seed == 1, "cure")
        for seed in range(2)
        for layer in (0, 1, 2, 9)
    ]  # fmt: skip
    (row,) = alarm_rows(replace(comparison, alarms=alarms))
    assert (row.variant, row.on, row.raised, row.runs, row.layers) == ("moe", 1, 2, 3, "0–2, 9")
    assert (row.first_step, row.worst, row.threshold) == (20, 0.59, 0.25)


def test_held_out_curves_are_in_the_unit_of_the_verdicts_and_begin_after_the_fall(
    comparison: Comparison, cast: Cast
) -> None:
    section = next(one for one in sections(comparison, cast) if one.title == "Held-out loss along the run")
    chart = section.charts[0]
    assert chart.data["unit"] == "bits per byte"
    line = chart.data["lines"][0]
    untrained, last = line["y"][0], line["y"][-1]
    assert untrained == pytest.approx(math.log(257) / math.log(2), rel=1e-3)
    assert chart.data["view"][0] < last < chart.data["view"][1] < untrained


def test_at_most_so_many_variants_have_colours_and_the_baseline_is_one_of_them(make_run: MakeRun) -> None:
    paths = [make_run(f"v{n:02d}", router=f"r{n}", quality=n / 100) for n in range(12)]
    for baseline in ("v11", "v00"):
        many = compare(read_runs(paths), baseline)
        cast = Cast.of(many)
        main = [line.name for place, line in enumerate(many.lines) if cast.is_main(place)]
        best = [line.name for line in many.lines if line.name != baseline]
        assert sorted(main) == sorted([*best[: len(COLOURS) - 1], baseline])
    assert "The baseline and the 7 best have colours" in render(many)


def test_what_is_unfair_is_told_by_value_with_five_names(comparison: Comparison) -> None:
    (told,) = [one for one in comparison.warnings if "different numbers of tokens" in one]
    assert re.search(r"1,228,800 in (\w+, ){4}\w+ and 1 more", told)
    assert re.search(r"983,040 in sigmoid_seed0, sigmoid_seed1, sigmoid_seed2", told)


def test_thirty_runs_of_28_layers_and_64_experts_are_a_small_file(make_run: MakeRun) -> None:
    """Random numbers, which compress to nothing: a worst case."""
    runs = read_runs([make_run("dense", router=None), make_run("moe")])
    rng, expert_load = np.random.default_rng(0), np.random.default_rng(1).dirichlet(np.ones(64), 28)
    tags = [f"moe/{where}/{metric}" for where in (*(f"layer_{n:02d}" for n in range(28)), "mean")
            for metric in ("max_violation", "dead_fraction", "load_entropy", "router_entropy")]  # fmt: skip
    many = [runs[0]]
    for number in range(29):
        rows = [row | dict(zip(tags, rng.random(len(tags)).tolist(), strict=True)) for row in runs[1].rows]
        extra = [{k: v + rng.random() for k, v in row.items()} for row in rows for _ in range(6)]
        summary = runs[1].summary | {"expert_load": {str(n): list(row) for n, row in enumerate(expert_load)}}
        config = runs[1].config | {"optimizer": {"lr": 1e-3 * (1 + number)}}
        many.append(replace(runs[1], name=f"moe{number:02d}", rows=extra, summary=summary, config=config))
    page = render(compare(many, "dense"))
    assert len(page.encode()) < LARGEST


def test_the_libraries_are_the_published_ones_and_their_licences_travel_with_them(page: str) -> None:
    vendor = PAGE / "vendor"
    table = dict(re.findall(r"^\| `(\S+)` .* (\w{64}) \|$", (vendor / "README.md").read_text(), re.MULTILINE))
    assert set(table) == {path.name for path in vendor.glob("*.js")}
    for name, digest in table.items():
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest
        assert (vendor / name).read_text() in page
    for license_text in vendor.glob("LICENSE-*"):
        assert "Permission to use, copy, modify" in license_text.read_text()
        assert html.escape(license_text.read_text(), quote=True).replace("&quot;", "&#34;") in page


def test_every_place_for_a_chart_has_its_figure_and_every_figure_its_place(page: str) -> None:
    (data,) = re.findall(r"^const report = (\{.*\});$", page, re.MULTILINE)
    figures = json.loads(data)["figures"]
    assert set(re.findall(r'<div class="plot" id="([^"]+)">', page)) == set(figures)
    drawn = (PAGE / "charts.js").read_text()
    for kind in {figure["kind"] for figure in figures.values()}:
        assert f"function {kind}(place" in drawn


def test_runs_and_their_seeds_are_rows_of_a_table_and_no_line_of_words(make_run: MakeRun) -> None:
    paths = []
    for seed in range(6):
        for name, fields in (("dense", {"router": None}), ("moe", {"quality": -0.1})):
            lost = {"status": "failed", "steps": 100, "planned": 300} if (name, seed) == ("moe", 5) else {}
            path = make_run(f"{name}_seed{seed}", seed=seed, **fields, **lost)
            summary = json.loads((path / "summary.json").read_text())
            stages = [["training", f"seed {seed}, order {70 + seed}"]] * 3 + [["conversion", f"seed {90 + seed}"]]
            summary["lineage"] = {"recipe": "one", "stages": stages}
            (path / "summary.json").write_text(json.dumps(summary))
            paths.append(path)
    comparison = compare(read_runs(paths), "dense")
    table = replicates(comparison)
    assert table.folded and len(table.rows) == 12 and table.columns == ["seed", "source", "conversion"]
    by_run = {row.run: row for row in table.rows}
    assert by_run["dense_seed3"].seeds == ["3", "seed 3, order 73 (3 times)", "seed 93"]
    assert by_run["moe_seed5"].counted == "no, failed" and by_run["moe_seed4"].counted == "yes"
    for line in comparison.lines:
        losses = [float(by_run[name].loss) for name in line.runs if by_run[name].counted == "yes"]
        assert line.score == pytest.approx(np.mean(losses), abs=1e-4)
    page = render(comparison)
    assert len(re.findall(r"<td>seed \d, order 7\d \(3 times\)</td>", page)) == 12
    assert '<a href="#runs">5 of 6 seeds</a>' in page and '<a href="#runs">6 seeds</a>' in page and 'id="runs"' in page


def test_runs_of_one_seed_each_have_no_table_of_their_own(make_run: MakeRun) -> None:
    comparison = compare(read_runs([make_run("a"), make_run("b", quality=0.1)]), "a")
    assert not replicates(comparison).rows and 'id="runs"' not in render(comparison)
