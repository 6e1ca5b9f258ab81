"""docs/findings.md is what the declarations and findings say, and shows nulls, amendments and changes since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from moelab_tools.experiments.declaration import read_declaration
from moelab_tools.experiments.pages import page
from sweeping import ROOT

DECLARED = {
    "question": "Does it matter?",
    "variants": {"a": [], "b": ["optimizer.lr=1e-4"], "c": ["optimizer.lr=1e-5"]},
    "baseline": "a",
    "decision": {word: f"concluded {word}" for word in ("better", "worse", "negligible", "not resolved")},
}


def test_the_page_of_findings_is_in_step() -> None:
    found = (ROOT / "docs/findings.md").read_text(encoding="utf-8")
    again = "run: python -m moelab_tools.experiments.pages docs/findings.md"
    assert page(ROOT / "configs/experiments") == found, again


def test_every_shipped_declaration_can_be_read_and_its_findings_are_of_it() -> None:
    """Findings whose declaration has changed since must be run again, or amended."""
    for path in sorted((ROOT / "configs/experiments").glob("*/experiment.yaml")):
        declaration = read_declaration(path)
        findings = path.parent / "results" / "findings.json"
        if findings.is_file():
            assert json.loads(findings.read_text())["declaration"]["hash"] == declaration.hash, path


def _findings(declaration_hash: str, **changed: Any) -> dict[str, Any]:
    none: dict[str, Any] = dict.fromkeys(("loss", "sd_over_seeds"))
    verdict: dict[str, Any] = {"difference_percent": -0.02, "low_percent": -0.3, "high_percent": 0.26, "pairs": 3}
    verdict |= {"could_have_seen_percent": 0.5, "smaller_percent": 0.2, "seeds_for_smaller": 21, "seeds_at_verdict": 3}
    null = none | verdict | {"verdict": "not resolved", "concluded": "concluded not resolved"}
    return {
        "declaration": {"hash": declaration_hash, "declared": DECLARED, "amendments": []},
        "ended": "All 3 seeds are in.", "measure": "bits per byte", "baseline": "a", "seeds": [0, 1, 2],
        "variants": {"a": none, "b": null, "c": none | {"verdict": None, "concluded": "nothing"}},
        "failed": {"c_seed1": "it said nothing"}, "runs": {}, "minutes": 3.0, "command": "moelab experiment x",
    } | changed  # fmt: skip


def test_nulls_failures_amendments_and_later_changes_are_shown(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    (folder / "results").mkdir(parents=True)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(DECLARED))
    assert "not run yet" in page(tmp_path)
    known = read_declaration(folder).hash
    path = folder / "results" / "findings.json"
    path.write_text(json.dumps(_findings(known)))
    text = page(tmp_path)
    assert "not resolved: b; no verdict: c (than a)" in text
    assert "b: 3 pairs could have seen 0.5 %; for 0.2 % it needs 21" in text
    assert "c_seed1 did not end well: it said nothing" in text
    assert "−0.02 [−0.30, +0.26]" in text
    assert "has changed since" not in text
    one = {"first": 1.0, "last": 0.5}
    logged = {"x/*": {"a": one | {"names": 3}}, "x/1": {"a": one | {"names": 1}}}
    declared = {"hash": known, "declared": DECLARED | {"logged": {"names": ["x/*"], "first": 1, "last": 1}}}
    path.write_text(json.dumps(_findings(known, logged=logged, declaration=declared | {"amendments": []})))
    assert "| `x/*`, mean of 3 | 1.0000 → 0.5000 |\n\n0 runs" in page(tmp_path), "one row, and what it is of elsewhere"
    note = {"why": "a typo", "changed": "practical", "from": "x", "to": known}
    path.write_text(json.dumps(_findings("x", declaration={"hash": "x", "declared": {}, "amendments": [note]})))
    text = page(tmp_path)
    assert "The declaration has changed since" in text
    assert "**Changed after the first run**: practical. Why: a typo" in text
