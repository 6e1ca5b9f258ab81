"""What an experiment asks of longer texts: refused where it can't be, looked at once, and told by the rule declared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moelab.errors import ConfigError
from moelab_tools.experiments import reached
from moelab_tools.experiments.conduct import ExperimentRequest, run_experiment
from moelab_tools.experiments.declaration import read_declaration
from moelab_tools.experiments.reaching import Reaching
from sweeping import TINY, InProcess, quiet

DECISION = {"better": "take it", "worse": "leave it", "negligible": "either", "not resolved": "more seeds"}
LENGTHS: dict[str, Any] = {
    "question": "Which way reaches?",
    "moments": {"end": 2},
    "ways": {"window": {"attention": "sliding_window"}, "plain": {}, "yarn": {"rope_scaling": "yarn"}},
    "baseline": "window",
    "at": "1x,2x",
    "tokens": 128,
    "decision": DECISION,
}
DECLARED: dict[str, Any] = {
    "question": "Does a smaller rate matter?", "configs": [*TINY, "train.save_every=2"], "baseline": "plain",
    "variants": {"plain": [], "slow": ["optimizer.lr=1e-4"]}, "seeds": "0..2", "decision": DECISION, "lengths": LENGTHS,
}  # fmt: skip


def declare(folder: Path, **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    declared = DECLARED | {"lengths": LENGTHS | changed}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(declared, sort_keys=False))
    return folder


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"moments": {}}, r"lengths.moments: names none"),
        ({"baseline": "windows"}, r"lengths.baseline: 'windows' must be one of .*did you mean 'window'"),
        ({"ways": {"window": {"rope": "yarn"}, "plain": {}}}, r"lengths.ways.window.rope: unknown"),
        ({"at": "2y"}, r"--length: '2y' is no length"),
        ({"tokens": 0}, r"lengths: tokens and passkey must be at least 1"),
        ({"decision": {"better": "x"}}, r"lengths.decision: write what is concluded"),
    ],
)
def test_what_can_not_be_asked_is_refused_before_anything_runs(
    changed: dict[str, Any], wrong: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=wrong):
        read_declaration(declare(tmp_path / "one", **changed))


def test_every_run_is_looked_at_once_and_the_findings_tell_of_it(tmp_path: Path) -> None:
    folder, worker = declare(tmp_path / "one"), InProcess()
    run_experiment(ExperimentRequest(folder, out=tmp_path / "out"), quiet(), worker)
    looks = [name for name in worker.started if name.endswith(".end")]
    assert sorted(looks) == sorted(f"{name}_seed{seed}.end" for name in ("plain", "slow") for seed in range(3))
    findings = json.loads((folder / "results" / "findings.json").read_text())
    end = findings["lengths"]["slow"]["end"]
    assert (end["trained"], end["seeds"], [one["length"] for one in end["lengths"]]) == (32, [0, 1, 2], [32, 64])
    ways = end["lengths"][1]["ways"]
    assert set(ways) == set(LENGTHS["ways"])
    assert ways["plain"]["concluded"] == DECISION[ways["plain"]["verdict"]]
    assert "verdict" not in ways["window"]
    assert "verdict" not in end["lengths"][0]["ways"]["plain"], "words at the greatest length alone"
    text = (folder / "results" / "reading.md").read_text()
    assert "Which way reaches?" in text
    assert "slow, end: trained on 32 tokens" in text
    assert "move from the first half of the trained length to its second" in text
    again = InProcess()
    run_experiment(ExperimentRequest(folder, out=tmp_path / "out"), quiet(), again)
    assert again.started == []


def kept(seed: int, harms: dict[str, float]) -> dict[str, Any]:
    """As `lengths.kept` reads it: 40 documents of 100 tokens each, at 1x and 8x; nats a token above the window's."""
    noise = np.random.default_rng(seed)
    own = 1.5 + 0.1 * noise.standard_normal(40) + 0.02 * noise.standard_normal()
    ways: dict[str, Any] = {}
    for name, harm in harms.items():
        jitter = 1e-4 * np.random.default_rng([seed, len(name)]).standard_normal(40)
        ways[name] = [
            {
                "length": length, "passkey": {"0": 0.5, "0.25": 0.0, "0.5": 0.0, "0.75": 0.0, "1": 0.0}, "drift": {},
                "drift_within": {}, "entropy": {"0": {"001": 0.0, "064-127": 2.0, "128": 9.0}},
                "documents": {f"d{i}": [100 * float(own[i] + far * (harm + jitter[i])), 100] for i in range(40)},
            }
            for length, far in ((16, 0), (128, 1))
        ]  # fmt: skip
    return {"trained": 16, "ways": ways}


def test_words_are_those_of_differences_to_the_baseline_over_seeds_and_documents() -> None:
    harms = {"window": 0.0, "harms": 0.3, "helps": -0.05, "nothing": 0.0003}
    asked = Reaching("?", {"end": 1}, {name: {} for name in harms}, "window", passkey=2, decision=DECISION)
    known = {seed: kept(seed, harms) for seed in range(5)}
    found = reached._moment(asked, known, reached.Rules(True, 0.002), 4)
    last = found["lengths"][1]["ways"]
    assert {name: one["verdict"] for name, one in last.items() if "verdict" in one} == {
        "harms": "worse", "helps": "better", "nothing": "negligible",
    }  # fmt: skip
    assert last["harms"]["difference_percent"] == pytest.approx(100 * 0.3 / last["window"]["loss"], abs=0.02)
    assert last["harms"]["low_percent"] < last["harms"]["difference_percent"] < last["harms"]["high_percent"]
    assert last["window"]["keys"] == {"found": 5, "of": 50}
    assert last["window"]["entropy"] == 2.0, "in the last bin that begins below the length"
    narrow = reached._moment(asked, known, reached.Rules(True, 0.002), 1)["lengths"][1]["ways"]["harms"]
    assert narrow["high_percent"] < last["harms"]["high_percent"], "more tables, wider intervals"
