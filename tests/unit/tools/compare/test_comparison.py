"""What is concluded from runs: refusals, grouping by seed, verdicts, equal budgets."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moelab.errors import UserError
from moelab_tools.compare import sentences, wording
from moelab_tools.compare.budgets import equal_budgets
from moelab_tools.compare.comparison import Comparison, compare
from moelab_tools.compare.measure import BITS_PER_BYTE, NATS_PER_TOKEN
from moelab_tools.compare.runs import read_runs

MakeRun = Callable[..., Path]


def compared(*paths: Path, **options: Any) -> Comparison:
    return compare(read_runs(paths), **options)


def verdicts(comparison: Comparison) -> dict[str, str]:
    return {line.name: line.verdict for line in comparison.lines}


def change_config(path: Path, key: str, value: Any) -> None:
    config = yaml.safe_load((path / "config.yaml").read_text())
    config[key] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"fingerprint": "sha256:bbbb"}, ["fingerprint", "sha256:aaaa", "sha256:bbbb"]),
        ({"tokenizer": "bpe"}, ["tokenizer", "bytes", "bpe"]),
        ({"documents": 59}, ["evaluation documents", "60 documents", "59 documents", "absent"]),
    ],
)
def test_runs_of_different_data_are_refused_unless_allowed(
    make_run: MakeRun, fields: dict[str, Any], named: list[str]
) -> None:
    paths = make_run("one"), make_run("other", **fields)
    with pytest.raises(UserError) as error:
        compared(*paths)
    for word in (*named, "one", "other", "--allow-different-data"):
        assert word in str(error.value)
    comparison = compared(*paths, allow_different_data=True)
    assert len(comparison.conflicts) == 1
    assert len(comparison.lines) == 2


def test_documents_read_to_another_length_are_refused(make_run: MakeRun) -> None:
    paths = make_run("one"), make_run("other")
    documents = paths[1] / "evaluation_documents.jsonl"
    first, *rest = documents.read_text().splitlines()
    shorter = json.loads(first) | {"tokens": 7, "bytes": 7}
    documents.write_text("\n".join([json.dumps(shorter), *rest]) + "\n")
    with pytest.raises(UserError, match="7 tokens, 7 bytes"):
        compared(*paths)


def seeds_of(make_run: MakeRun, name: str, seeds: tuple[int, ...] = (0, 1, 2), **fields: Any) -> list[Path]:
    return [make_run(f"{name}_seed{seed}", seed=seed, **fields) for seed in seeds]


def test_a_clear_difference_over_three_seeds_is_resolved_and_a_tiny_one_is_not(make_run: MakeRun) -> None:
    paths = [*seeds_of(make_run, "good"), *seeds_of(make_run, "twin", router="top", quality=0.0001)]
    comparison = compared(*paths, *seeds_of(make_run, "bad", router=None, quality=0.1))
    found = verdicts(comparison)
    assert found["bad"] == "worse"
    assert {found["good"], found["twin"]} == {"lowest", "not resolved"}
    assert comparison.lines[-1].name == "bad"
    gap = comparison.lines[-1].difference
    assert gap is not None and gap.low is not None and gap.high is not None
    assert gap.low <= 0.1 / math.log(2) <= gap.high  # the quality it was made with
    assert (gap.covers, gap.corrected_for) == ("training seeds and held-out text", 3)


def test_the_lowest_is_best_only_where_every_other_is_worse(make_run: MakeRun) -> None:
    good, bad = seeds_of(make_run, "good"), seeds_of(make_run, "bad", router=None, quality=0.1)
    assert verdicts(compared(*good, *bad)) == {"good": "best", "bad": "worse"}
    assert verdicts(compared(*good, *bad, baseline="good")) == {"good": "baseline", "bad": "worse"}
    assert verdicts(compared(*good, *bad, make_run("one", router="x", quality=0.2)))["good"] == "lowest"


def test_a_lower_single_run_takes_no_verdict_from_variants_that_have_seeds(make_run: MakeRun) -> None:
    paths = [*seeds_of(make_run, "good"), *seeds_of(make_run, "bad", router=None, quality=0.1)]
    comparison = compared(*paths, make_run("lucky", router="x", quality=-0.1))
    assert comparison.baseline == "good"
    assert verdicts(comparison) == {"lucky": "one seed", "good": "baseline", "bad": "worse"}
    assert "Differences are to good, the lowest of those with three seeds" in sentences.headlines(comparison)[0]


def test_one_seed_gets_no_word_however_large_the_difference(make_run: MakeRun) -> None:
    comparison = compared(make_run("good"), make_run("bad", quality=0.5, router=None))
    assert verdicts(comparison) == {"good": "lowest", "bad": "one seed"}
    gap = comparison.lines[-1].difference
    assert gap is not None
    assert (gap.covers, gap.p, gap.could_have_seen) == ("held-out text", None, None)
    told = " ".join(sentences.headlines(comparison))
    assert "With one seed that can be luck: no verdict" in told
    assert not re.search("better|worse|best", told)


def test_the_score_is_all_nats_over_all_bytes(make_run: MakeRun) -> None:
    path = make_run("a")
    rows = [json.loads(line) for line in (path / "evaluation_documents.jsonl").read_text().splitlines()]
    expected = sum(row["nats"] for row in rows) / sum(row["bytes"] for row in rows) / math.log(2)
    assert compared(path).lines[0].score == pytest.approx(expected)


def test_the_baseline_can_be_named_by_run_variant_or_folder(make_run: MakeRun) -> None:
    paths = make_run("good"), make_run("bad", quality=0.1)
    for name in ("bad", str(paths[1]), f"{paths[1]}/"):
        comparison = compared(*paths, baseline=name)
        assert verdicts(comparison) == {"good": "one seed", "bad": "baseline"}
    with pytest.raises(UserError, match=r"--baseline nobody.*good, bad"):
        compared(*paths, baseline="nobody")


def test_runs_that_differ_only_in_seed_are_one_variant(make_run: MakeRun) -> None:
    moe, dense = compared(*seeds_of(make_run, "moe"), *seeds_of(make_run, "dense", router=None, quality=0.1)).lines
    assert (moe.name, moe.seeds, dense.name) == ("moe", [0, 1, 2], "dense")
    assert moe.score_sd is not None
    assert dense.difference is not None
    assert dense.difference.method.startswith("paired t over 3 pairs of seeds")


def test_different_seeds_are_not_paired(make_run: MakeRun) -> None:
    paths = [*seeds_of(make_run, "moe"), *seeds_of(make_run, "dense", (3, 4, 5), router=None, quality=0.1)]
    dense = compared(*paths).lines[-1]
    assert dense.difference is not None
    assert not dense.difference.paired
    assert dense.difference.method.startswith("Welch's t")
    assert dense.multipliers == []


def test_one_run_against_several_is_the_pair_of_its_seed(make_run: MakeRun) -> None:
    """The mean of several runs is never subtracted from a single one."""
    several, single = seeds_of(make_run, "moe"), make_run("dense", router=None, quality=0.1, seed=1)
    line = compared(*several, single, baseline="moe").lines[-1]
    pair = compared(several[1], single, baseline="moe_seed1").lines[-1]
    assert line.difference is not None and pair.difference is not None
    assert (line.verdict, line.difference.pairs) == ("one seed", 1)
    assert line.difference.difference == pytest.approx(pair.difference.difference)
    alone = compared(*several, make_run("other", router=None, quality=0.1, seed=9), baseline="moe").lines[-1]
    assert alone.difference is not None
    assert (alone.verdict, alone.difference.difference) == ("no common seed", None)


def test_seeds_that_change_nothing_are_one_run(make_run: MakeRun) -> None:
    """As from one checkpoint with a router that draws no noise: no interval over three copies."""
    copies = seeds_of(make_run, "upcycled", quality=-0.1)
    for path in copies[1:]:
        documents = (copies[0] / "evaluation_documents.jsonl").read_text()
        (path / "evaluation_documents.jsonl").write_text(documents)
    comparison = compared(*copies, *seeds_of(make_run, "dense", router=None), baseline="dense")
    assert verdicts(comparison)["upcycled"] == "one seed"
    assert any("gave the same result to the last bit" in told for told in sentences.remarks(comparison))


def test_a_seed_that_failed_is_told_and_the_others_count(make_run: MakeRun) -> None:
    paths = [*seeds_of(make_run, "dense", (0, 1, 2, 3), router=None, quality=0.1), *seeds_of(make_run, "moe")]
    comparison = compared(*paths, make_run("moe_seed3", seed=3, status="failed"))
    moe = comparison.lines[0]
    assert (moe.name, moe.status, moe.counted, len(moe.runs)) == ("moe", "finished", 3, 4)
    assert comparison.lines[1].verdict == "worse"
    assert comparison.lines[1].difference is not None and comparison.lines[1].difference.pairs == 3
    assert any("1 of 4 runs did not finish (moe_seed3 failed)" in told for told in sentences.remarks(comparison))


def start_from(path: Path, recipe: str, *stages: tuple[str, str]) -> None:
    """As a run whose starting weights were made so."""
    change_config(path, "train", {"steps": 300, "init_from": str(path) + "_start"})
    summary = json.loads((path / "summary.json").read_text())
    summary["lineage"] = {"recipe": recipe, "stages": stages}
    (path / "summary.json").write_text(json.dumps(summary))


def test_runs_from_other_seeds_of_one_conversion_are_one_variant_and_pair_with_the_dense_model(
    make_run: MakeRun,
) -> None:
    upcycled = seeds_of(make_run, "upcycled", quality=-0.1)
    dense = seeds_of(make_run, "dense", router=None)
    for seed, (mine, theirs) in enumerate(zip(upcycled, dense, strict=True)):
        start_from(mine, "conversion of a", ("training", "seed 0"), ("conversion", f"seed {seed}"))
        start_from(theirs, "a", ("training", "seed 0"))
    comparison = compared(*upcycled, *dense, baseline="dense")
    assert verdicts(comparison) == {"upcycled": "better", "dense": "baseline"}
    assert comparison.lines[0].seeds[1] == "1, source seed 0, conversion seed 1"
    assert comparison.lines[0].difference is not None and comparison.lines[0].difference.paired


def test_runs_from_other_recipes_of_weights_are_other_variants(make_run: MakeRun) -> None:
    paths = seeds_of(make_run, "moe")
    for recipe, path in zip("aab", paths, strict=True):
        start_from(path, recipe)
    assert sorted(line.counted for line in compared(*paths).lines) == [1, 2]


def test_runs_of_one_dense_source_are_averaged_where_sources_are_the_sample(make_run: MakeRun) -> None:
    """Six runs of three sources are three pairs: runs of one source share its luck."""
    paths = []
    for name, fields in (("moe", {"quality": -0.1}), ("dense", {"router": None})):
        for seed in range(6):
            path = make_run(f"{name}_seed{seed}", seed=seed, **fields)
            start_from(path, "a", ("training", f"seed {seed // 2}"))
            paths.append(path)
    comparison = compared(*paths, baseline="dense")
    gap = comparison.lines[0].difference
    assert gap is not None and gap.difference is not None
    assert (gap.pairs, comparison.lines[0].verdict) == (3, "better")
    scores = {line.name: line.score for line in comparison.lines}
    assert gap.difference == pytest.approx(scores["moe"] - scores["dense"])  # type: ignore[operator]
    assert any("3 dense sources of one recipe" in warning for warning in comparison.warnings)


def test_at_equal_budgets_a_run_that_went_on_is_not_called_worse(make_run: MakeRun) -> None:
    """Its learning rate had not come down there: the schedule explains the difference."""
    short = seeds_of(make_run, "short", steps=150, flops_per_token=2e6)
    long = seeds_of(make_run, "long", steps=300, quality=0.1, router=None, flops_per_token=2e6)
    lines = {line.name: line for line in compared(*short, *long, baseline="short").lines}
    assert lines["long"].at_equal["tokens"].verdict == "cut short"
    same = {line.name: line for line in compared(*short, *long, baseline="long").lines}
    assert same["short"].at_equal["tokens"].verdict == "cut short"


def test_equal_budgets_have_verdicts_of_their_own(make_run: MakeRun) -> None:
    """Better by token, worse by FLOP: a MoE that costs four times as much."""
    moe = seeds_of(make_run, "moe", quality=-0.1, flops_per_token=8e6)
    dense = seeds_of(make_run, "dense", router=None, flops_per_token=2e6)
    line = compared(*moe, *dense, baseline="dense").lines[0]
    assert line.at_equal["tokens"].verdict == line.verdict == "better"
    assert line.at_equal["flops"].verdict == "cut short"  # the dense model's whole budget is a quarter of its own
    assert {one.axis for one in line.multipliers} == {"tokens", "flops", "seconds"}
    by_axis = {one.axis: one for one in line.multipliers}
    assert by_axis["tokens"].factor > 1 > by_axis["flops"].factor
    assert by_axis["flops"].factor == pytest.approx(by_axis["tokens"].factor / 4)


def test_a_loss_that_still_falls_fast_is_warned_of(make_run: MakeRun) -> None:
    assert any("still falling fast" in warning for warning in compared(make_run("a", steps=60)).warnings)
    assert not any("still falling fast" in warning for warning in compared(make_run("b", steps=2000)).warnings)


def test_many_runs_are_told_as_a_range_and_not_one_by_one(make_run: MakeRun) -> None:
    several = [make_run(f"dear{n}", steps=240, seed=n, flops_per_token=2e6) for n in range(5)]
    comparison = compared(make_run("cheap", flops_per_token=1e6), *several)
    assert "around it: 5 runs, by evaluations from 0.80 to 1.20 of it." in " ".join(wording.budgets(comparison))
    falling = compared(*(make_run(f"a{n}", steps=40, seed=n) for n in range(12)))
    assert re.search(r" and \d more\)", next(one for one in falling.warnings if "still falling fast" in one))


def test_what_looks_at_later_tokens_is_said(make_run: MakeRun) -> None:
    found = {"plain": {}, "choice": {"training": [0], "evaluation": []}, "ahead": {"training": [], "evaluation": [1]}}
    paths = {name: make_run(name) for name in (*found, "old")}
    for name, layers in found.items():
        summary = json.loads((paths[name] / "summary.json").read_text())
        (paths[name] / "summary.json").write_text(json.dumps(summary | {"noncausal": layers}))
    told = [line for line in compared(*paths.values()).warnings if "later tokens" in line]
    assert len(told) == 2
    assert told[0].startswith("ahead: looks at later tokens in evaluation: its held-out loss is not comparable")
    assert told[1].startswith("choice: looks at later tokens in training: its training loss is not comparable")


def test_a_repetition_of_a_seed_is_no_second_sample(make_run: MakeRun) -> None:
    comparison = compared(make_run("a"), make_run("b"))
    assert [line.runs for line in comparison.lines] in ([["a"], ["b"]], [["b"], ["a"]])
    assert any("repeats" in warning for warning in comparison.warnings)


def test_unfinished_runs_are_shown_last_and_never_best(make_run: MakeRun) -> None:
    comparison = compared(
        make_run("fine", quality=3.0),
        make_run("stopped", status="failed", steps=120),
        make_run("killed", status="killed", steps=90),
    )
    assert verdicts(comparison) == {"fine": "lowest", "stopped": "failed", "killed": "unfinished"}
    assert comparison.lines[0].name == "fine"
    assert any("stopped is failed" in warning for warning in comparison.warnings)
    assert any("killed has no summary.json" in warning for warning in comparison.warnings)


def test_one_run_alone_is_shown_without_a_verdict(make_run: MakeRun) -> None:
    comparison = compared(make_run("alone"))
    assert verdicts(comparison) == {"alone": "lowest"}
    assert comparison.budgets == []


def test_without_bytes_the_measure_is_nats_per_token(make_run: MakeRun) -> None:
    path = make_run("a")
    documents = path / "evaluation_documents.jsonl"
    rows = [json.loads(line) for line in documents.read_text().splitlines()]
    documents.write_text("".join(json.dumps(row | {"bytes": None}) + "\n" for row in rows))
    comparison = compared(path)
    assert comparison.measure.name == "nats per token"
    expected = sum(row["nats"] for row in rows) / sum(row["tokens"] for row in rows)
    assert comparison.lines[0].score == pytest.approx(expected)


def change_documents(path: Path, change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
    documents = path / "evaluation_documents.jsonl"
    rows = [change(number, json.loads(line)) for number, line in enumerate(documents.read_text().splitlines())]
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_a_document_of_which_only_the_end_was_scored_changes_no_unit(make_run: MakeRun) -> None:
    """One token and no byte: that is a count, not a lack of one."""
    paths = make_run("a"), make_run("b", quality=0.1)
    for path in paths:
        rows = change_documents(
            path, lambda n, row: row | ({"tokens": 1, "bytes": 0, "domain": "end"} if n == 0 else {})
        )
    comparison = compared(*paths)
    assert comparison.measure.name == "bits per byte"
    assert comparison.lines[-1].score == pytest.approx(
        sum(row["nats"] for row in rows) / sum(row["bytes"] for row in rows) / math.log(2)
    )
    assert comparison.lines[-1].difference is not None
    assert math.isfinite(comparison.lines[-1].difference.low)
    assert "end" not in comparison.domains


def test_documents_whose_bytes_one_run_does_not_know_are_left_out_of_all_and_told(make_run: MakeRun) -> None:
    paths = make_run("a"), make_run("b", quality=0.1)
    whole = change_documents(paths[0], lambda n, row: row)
    change_documents(paths[1], lambda n, row: row | ({"bytes": None} if n in (3, 5) else {}))
    comparison = compared(*paths)
    assert comparison.measure.name == "bits per byte"
    kept = [row for number, row in enumerate(whole) if number not in (3, 5)]
    names = [whole[number]["document"] for number in (3, 5)]
    expected = sum(row["nats"] for row in kept) / sum(row["bytes"] for row in kept) / math.log(2)
    assert comparison.lines[0].score == pytest.approx(expected)
    (told,) = [warning for warning in comparison.warnings if "no count of bytes" in warning]
    assert told.startswith(f"2 of {len(whole)} held-out documents (first '{min(names)}')")


def test_a_run_without_bytes_takes_the_whole_comparison_to_nats_and_says_why(make_run: MakeRun) -> None:
    paths = make_run("a"), make_run("b", quality=0.1)
    change_documents(paths[1], lambda n, row: {key: value for key, value in row.items() if key != "bytes"})
    comparison = compared(*paths)
    assert comparison.measure.name == "nats per token"
    assert any(
        warning.endswith("nats per token, not bits per byte: no count of the text's bytes in b")
        for warning in comparison.warnings
    )
    assert comparison.lines[-1].difference is not None


def change_summary(path: Path, **data: Any) -> None:
    summary = json.loads((path / "summary.json").read_text())
    summary["data"] |= data
    (path / "summary.json").write_text(json.dumps(summary))


def test_seen_text_is_said_of_all_runs_it_holds_for(make_run: MakeRun) -> None:
    paths = [make_run(name) for name in ("a", "b", "clean", "old", "public")]
    seen = {"source": "runs/dense", "scored": 52, "scored_trained": 16, "scored_read": 9, "held_out": 64,
            "held_out_trained": 21, "unknown": []}  # fmt: skip
    for path in paths[:2]:
        change_summary(path, seen=seen)
    change_summary(paths[2], seen=seen | {"scored_trained": 0, "held_out_trained": 0})
    change_config(paths[3], "train", {"init_from": "runs/older"})
    change_summary(paths[4], seen={"source": "Qwen2-7B", "scored": 52, "held_out": 64, "unknown": ["Qwen2-7B"]})
    comparison = compared(*paths)
    assert len(comparison.seen) == 3
    told = " | ".join(comparison.seen)
    assert re.search(r"(a, b|b, a): 16 of 52 held-out documents that are scored \(21 of all 64\)", told)
    assert "old: held-out text may have been seen" in told
    assert "public: held-out text may have been seen: Qwen2-7B keeps no record" in told
    assert "clean" not in told
    assert comparison.to_json()["held_out_text_seen"] == comparison.seen


def test_the_order_of_reading_counts_as_a_seed(make_run: MakeRun) -> None:
    paths = [make_run(f"moe_{number}") for number in range(3)]
    for order, path in enumerate(paths):
        config = yaml.safe_load((path / "config.yaml").read_text())
        change_config(path, "data", config["data"] | {"order_seed": order or None})
    comparison = compared(*paths)
    assert [line.seeds for line in comparison.lines] == [[0, "0 (order 1)", "0 (order 2)"]]
    assert not any("repeats" in warning for warning in comparison.warnings)
    assert not any("different orders" in warning for warning in comparison.warnings)
    other = make_run("x", router="other")
    change_config(other, "data", config["data"] | {"order_seed": 7})
    assert any("different orders" in warning for warning in compared(*paths, other).warnings)


def test_equal_tokens_are_read_from_the_evaluation_curve(make_run: MakeRun) -> None:
    long, short = read_runs([make_run("long", steps=100, eval_every=20), make_run("short", steps=70, eval_every=10)])
    tokens = equal_budgets([long, short], BITS_PER_BYTE)[0]
    assert (tokens.axis, tokens.amount, tokens.cut_short) == ("tokens", 70 * 4096, ("long",))
    assert (tokens.unit, tokens.spent_by) == ("bits per byte", "short")
    known = dict(zip(*long.curve("eval/bits_per_byte"), strict=True))
    between = (known[60 * 4096] + known[80 * 4096]) / 2
    assert tokens.losses["long"] == pytest.approx(between)
    assert tokens.losses["short"] == pytest.approx(short.curve("eval/bits_per_byte")[1][-1])
    assert tokens.between == {"long": (60 * 4096, 80 * 4096)}
    assert tokens.rough == ("long",)  # 10 of 70 steps to the nearest evaluation


def test_both_budgets_have_one_unit_and_one_kind_of_loss(make_run: MakeRun) -> None:
    """A run without an evaluation on both sides has no number there, and is said to have none."""
    cheap, dear = read_runs(
        [make_run("cheap", flops_per_token=1e6, eval_every=0), make_run("dear", flops_per_token=2e6, eval_every=0)]
    )
    for measure in (BITS_PER_BYTE, NATS_PER_TOKEN):
        tokens, flops, _ = equal_budgets([cheap, dear], measure)
        assert tokens.unit == flops.unit == measure.name
        assert (tokens.cut_short, flops.cut_short) == ((), ("dear",))
        assert tokens.losses == {run.name: pytest.approx(run.curve(measure.tag)[1][-1]) for run in (cheap, dear)}
        assert flops.losses == {"cheap": tokens.losses["cheap"]}
        assert "evaluation.every" in flops.missing["dear"]
    told = " ".join(wording.budgets(compared(cheap.path, dear.path)))
    assert "dear: no evaluation before this point (set evaluation.every)" in told
    assert "* went on" not in told  # no number bears the mark: dear has none


def test_a_run_read_just_before_its_end_is_not_cut_short(make_run: MakeRun) -> None:
    """FLOPs of two recipes can be matched to a step, not to the last FLOP."""
    runs = read_runs([make_run("short", steps=199, eval_every=0), make_run("long", steps=200, eval_every=10)])
    tokens = equal_budgets(runs, BITS_PER_BYTE)[0]
    assert (tokens.amount, tokens.cut_short) == (199 * 4096, ())
    assert sorted(tokens.losses) == ["long", "short"]


def test_flops_that_rise_along_a_run_are_read_where_they_were_spent(make_run: MakeRun) -> None:
    """A run that serves more and more: its budget is what it had spent, not its last rate times its steps."""
    path = make_run("grows", steps=100, eval_every=10)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["flops"] = row["step"] ** 2 * 1e6
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"flops": 1e10}))
    steady = make_run("steady", steps=100, flops_per_token=4.9e9 / (100 * 4096))
    runs = read_runs([path, steady])
    flops = equal_budgets(runs, BITS_PER_BYTE)[1]
    assert (flops.amount, flops.spent_by) == (pytest.approx(4.9e9), "steady")
    known = dict(zip(*runs[0].curve("eval/bits_per_byte", "step"), strict=True))
    assert flops.losses["grows"] == pytest.approx(known[70])  # 70^2 = 4900


def test_a_run_that_did_not_count_is_left_out_at_equal_flops_and_told(make_run: MakeRun) -> None:
    """Written before format 2: its `flops` are those of the layout, whatever its router did."""
    old, dense, other = make_run("old"), make_run("dense", router=None), make_run("other", flops_per_token=4e6)
    for path in (old, dense):
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            del row["flops_declared"]
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        summary = json.loads((path / "summary.json").read_text())
        for key in ("format_version", "flops_declared"):
            del summary[key]
        (path / "summary.json").write_text(json.dumps(summary))
    comparison = compared(old, dense, other, baseline="dense")
    assert [budget.axis for budget in comparison.budgets] == ["tokens", "flops", "seconds"]
    assert comparison.budgets[1].missing == {"old": "what the experts served was not counted"}
    assert "old: what the experts served was not counted" in " ".join(wording.budgets(comparison))
    by_name = {line.name: line for line in comparison.lines}
    assert sorted(by_name["other"].at_equal) == ["flops", "seconds", "tokens"]
    assert sorted(by_name["old"].at_equal) == ["seconds", "tokens"]
    assert by_name["old"].flops is None
    assert by_name["old"].at_equal_flops is None
    assert by_name["dense"].flops == pytest.approx(300 * 4096 * 2e6)  # without experts there is nothing to count
    assert [w for w in comparison.warnings if "FLOPs" in w] == [
        "old was written before runs counted what their experts served: its FLOPs are not known, so it is left "
        "out at equal FLOPs; train it again"
    ]


def test_serving_other_than_declared_is_told(make_run: MakeRun) -> None:
    comparison = compared(make_run("as_said"), make_run("sparser", declared=1.25))
    assert [warning for warning in comparison.warnings if "declare" in warning] == [
        "sparser served 0.80 times the FLOPs that its routers declare; `explain`, `plan` and --match go by the "
        "declared ones, this comparison by the served ones"
    ]


def test_a_table_row_has_equal_tokens_and_equal_flops_in_its_own_unit(make_run: MakeRun) -> None:
    comparison = compared(make_run("cheap", flops_per_token=1e6), make_run("dear", steps=240, flops_per_token=2e6))
    cheap, dear = (next(line for line in comparison.lines if line.name == name) for name in ("cheap", "dear"))
    curve = dict(zip(*comparison.runs[[r.name for r in comparison.runs].index("dear")].curve(
        "eval/bits_per_byte", "step"), strict=True))  # fmt: skip
    assert dear.at_equal_tokens == pytest.approx(curve[240])
    assert dear.at_equal_flops == pytest.approx((curve[120] + curve[180]) / 2)  # 300 cheap steps are 150 dear ones
    assert wording.at_budget(comparison, dear, "flops") == f"~{dear.at_equal_flops:.4f}*"
    assert wording.at_budget(comparison, cheap, "flops") == f"{cheap.at_equal_flops:.4f}"
    assert "dear between 0.80 and 1.20 of it" in " ".join(wording.budgets(comparison))


def test_config_differences_are_only_the_keys_that_differ(make_run: MakeRun) -> None:
    paths = make_run("a"), make_run("b", router="sigmoid_topk")
    change_config(paths[1], "optimizer", {"lr": 2e-3})
    table = compared(*paths).config
    assert table["optimizer.lr"] in ([1e-3, 2e-3], [2e-3, 1e-3])
    assert "model.hidden_size" not in table
    assert "run_dir" not in table
    assert "model.moe.router.name" in table


def test_what_makes_a_comparison_unfair_is_said(make_run: MakeRun) -> None:
    paths = make_run("a"), make_run("b", steps=100, documents=60)
    summary = json.loads((paths[1] / "summary.json").read_text())
    summary |= {"threads": 16, "init_from": "runs/dense"}
    summary["data"]["batch_size"] = 8
    (paths[1] / "summary.json").write_text(json.dumps(summary))
    warnings = " | ".join(compared(*paths).warnings)
    for word in ("numbers of tokens", "data.batch_size", "different weights", "16 threads"):
        assert word in warnings


def test_the_json_is_valid_and_holds_the_interval(make_run: MakeRun) -> None:
    comparison = compared(make_run("a"), make_run("b", quality=0.1))
    found = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    worst = found["variants"][-1]
    assert worst["name"] == "b"
    assert worst["difference"]["low"] < worst["difference"]["difference"] < worst["difference"]["high"]
