"""What an experiment asks of its runs' routes: refused where it can't be, traced once, and told by layer and domain."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from moelab.errors import ConfigError, RunFailure
from moelab_tools.experiments import routed
from moelab_tools.experiments.conduct import ExperimentRequest, run_experiment
from moelab_tools.experiments.declaration import read_declaration
from moelab_tools.experiments.routed_tables import routes_section
from moelab_tools.routes.agreeing import Part, Row
from moelab_tools.routes.intervals import Estimate
from sweeping import TINY, InProcess, quiet

DECISION = {"better": "take it", "worse": "leave it", "negligible": "either", "not resolved": "more seeds"}
DECLARED: dict[str, Any] = {
    "question": "Do frozen routers keep their routes?", "configs": TINY,
    "prepare": [{"name": "first", "train": TINY}],
    "baseline": "plain", "seeds": "0..2", "decision": DECISION,
    # So small a rate leaves every weight as it was: all routes are kept, whatever the text.
    "variants": {
        "plain": ["train.init_from=@first", "optimizer.lr=0.05"],
        "still": ["train.init_from=@first", "optimizer.lr=1e-30"],
    },
    "routes": {"against": "first", "tokens": 128},
}  # fmt: skip


def declare(folder: Path, routes: dict[str, Any] | None, **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    declared = DECLARED | {"routes": routes} | changed
    (folder / "experiment.yaml").write_text(yaml.safe_dump(declared, sort_keys=False))
    return folder


@pytest.mark.parametrize(
    ("routes", "wrong"),
    [
        ({"against": "frist"}, r"routes.against: 'frist' is no step of `prepare` that trains, did you mean 'first'"),
        ({}, r"routes.against"),
        ({"against": "first", "tokens": 0}, r"routes.tokens: must be at least 1, not 0"),
        ({"against": "first", "domains": "all"}, r"routes.domains: no such key"),
    ],
)
def test_what_can_not_be_asked_is_refused_before_anything_runs(
    routes: dict[str, Any], wrong: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=wrong):
        read_declaration(declare(tmp_path / "one", routes))


def test_what_has_no_experts_can_not_be_compared_with(tmp_path: Path) -> None:
    dense = [
        {"name": "first", "train": [*(word for word in TINY if not word.startswith("model.moe")), "model.moe=null"]}
    ]
    folder = declare(
        tmp_path / "one", DECLARED["routes"], prepare=dense, variants={"plain": [], "slow": ["optimizer.lr=1e-4"]}
    )
    with pytest.raises(ConfigError, match="the model of first has no experts"):
        run_experiment(ExperimentRequest(folder, out=tmp_path / "out"), quiet(), InProcess())
    assert not (tmp_path / "out").exists()


def test_a_question_that_is_not_asked_changes_no_hash(tmp_path: Path) -> None:
    without = read_declaration(declare(tmp_path / "one", None))
    assert "routes" not in without.tree()
    assert read_declaration(declare(tmp_path / "two", DECLARED["routes"])).hash != without.hash


def test_every_run_is_traced_once_and_the_findings_tell_of_it(tmp_path: Path) -> None:
    wider = DECLARED["variants"] | {"wider": ["model.moe.layout.num_experts=8"]}
    folder, worker = declare(tmp_path / "one", DECLARED["routes"], variants=wider), InProcess()
    request = ExperimentRequest(folder, out=tmp_path / "out")
    with pytest.raises(RunFailure, match=r"3 runs .*\n  wider_seed0.routes: .*other MoE layers or numbers of experts"):
        run_experiment(request, quiet(), worker)
    traces = sorted(name for name in worker.started if name.endswith(".routes"))
    assert traces == sorted(f"{name}_seed{seed}.routes" for name in ("first", *wider) for seed in range(3))
    findings = json.loads((folder / "results" / "findings.json").read_text())
    (line,) = findings["routes"]["table"]
    assert (line["layer"], line["domain"], list(line["variants"])) == ("0", None, ["plain", "still"])
    still, plain = line["variants"]["still"], line["variants"]["plain"]
    assert (still["seeds"], still["share"], still["sd_over_seeds"]) == (3, 1.0, 0.0)
    assert plain["share"] < 1.0
    assert still["difference"] == pytest.approx(1.0 - plain["share"])
    assert "## Routes, by layer and domain" in (folder / "results" / "reading.md").read_text()
    again = InProcess()
    with pytest.raises(RunFailure):
        run_experiment(request, quiet(), again)
    assert again.started == []


def row(layer: str, **domains: float) -> Row:
    parts = {name: Part(Estimate(share, 0.01, 0.0, 7), Estimate(share, 0.01, 0.0, 7), 0.25)
             for name, share in domains.items()}  # fmt: skip
    whole = float(np.mean([*domains.values()]))
    return Row(layer, Part(Estimate(whole, 0.01, 0.0, 9), Estimate(whole, 0.01, 0.0, 9), 0.3), whole, parts)


def test_means_and_differences_are_students_over_seeds_and_stand_in_the_table() -> None:
    trained, frozen = [0.80, 0.84, 0.91, 0.86], [0.83, 0.85, 0.90, 0.92]
    known = {
        "trained": {seed: [row("0", code=share, law=0.5)] for seed, share in enumerate(trained)},
        "frozen": {seed: [row("0", code=share)] for seed, share in enumerate(frozen)},
    }
    assert routed._places(known) == [("0", None), ("0", "code"), ("0", "law")]
    found = routed._variants(("0", "code"), known, "trained", 0.05)
    for name, values in (("trained", trained), ("frozen", frozen)):
        half = stats.t.ppf(0.975, 3) * np.std(values, ddof=1) / math.sqrt(4)
        told = (found[name]["share"], found[name]["share_low"], found[name]["share_high"])
        assert told == pytest.approx((np.mean(values), np.mean(values) - half, min(1.0, np.mean(values) + half)))
    gaps = np.array(frozen) - np.array(trained)
    half = stats.t.ppf(0.975, 3) * gaps.std(ddof=1) / math.sqrt(4)
    one = found["frozen"]
    assert (one["difference"], one["low"], one["high"]) == pytest.approx(
        (gaps.mean(), gaps.mean() - half, gaps.mean() + half)
    )
    assert "difference" not in found["trained"]
    table = [{"layer": layer, "domain": domain, "variants": routed._variants((layer, domain), known, "trained", 0.05)}
             for layer, domain in routed._places(known)]  # fmt: skip
    findings = {
        "routes": {"against": "first", "tokens": 64, "table": table}, "baseline": "trained",
        "declaration": {"declared": {"protocol": {"error": 0.05}}},
    }  # fmt: skip
    lines = routes_section(findings)
    assert lines[4] == "| layer | domain | documents | trained | frozen | by chance |"
    assert lines[7].startswith("| 0 | `code` | 7 | 85.2 [") and "| 87.5 [" in lines[7]
    assert lines[8] == "| 0 | `law` | 7 | 50.0 [50.0, 50.0] | – | 25.0 |", "a variant that lacks a domain"
    assert routes_section(findings, short=True)[6:] == lines[6:], "of a single layer that layer"
    assert not routes_section(findings | {"routes": None})
