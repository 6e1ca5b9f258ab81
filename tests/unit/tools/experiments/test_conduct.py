"""An experiment from its declaration to its findings: hash, looks, preparation, changes, failed seeds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import moelab
from moelab.errors import ConfigError, RunFailure, UserError
from moelab_tools.compare.verdict import Verdict
from moelab_tools.experiments.conduct import ExperimentRequest, results_folder, run_experiment
from moelab_tools.experiments.declaration import read_declaration
from moelab_tools.experiments.findings import KEPT, READING
from sweeping import TINY, InProcess, quiet

DECISION = {"better": "take it", "worse": "leave it", "negligible": "either", "not resolved": "more seeds"}
SCRATCH: dict[str, Any] = {
    "question": "Does a smaller rate matter?",
    "configs": TINY,
    "variants": {"plain": [], "slow": ["optimizer.lr=1e-4"]},
    "baseline": "plain",
    "seeds": "0..2",
    "decision": DECISION,
}
LAYOUT = "{name: uniform, num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16}"
UPCYCLED: dict[str, Any] = SCRATCH | {
    "question": "Dense or upcycled?",
    "configs": [word for word in TINY if not word.startswith("model.moe")],
    "prepare": [
        {"name": "dense", "train": [*(word for word in TINY if not word.startswith("model.moe")), "model.moe=null"]},
        {
            "name": "sparse",
            "source": "dense",
            "upcycle": [
                f"model.moe.layout={LAYOUT}", "model.moe.shared_expert={name: gated, intermediate_size: 48}",
                "model.moe.router={name: softmax_topk, norm_topk_prob: false}", "workers=1", "entry_points=false",
            ],
        },
    ],
    "variants": {
        "dense_on": ["model.moe=null", "train.init_from=@dense"],
        "upcycled": [
            f"model.moe.layout={LAYOUT}", "model.moe.router={name: softmax_topk, norm_topk_prob: false}",
            "model.moe.shared_expert={name: gated, intermediate_size: 48}", "model.moe.balance_losses=[]",
            "train.init_from=@sparse",
        ],
    },
    "baseline": "dense_on",
}  # fmt: skip


def _declare(folder: Path, declared: dict[str, Any], **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(declared | changed, sort_keys=False))
    return folder


def _run(folder: Path, worker: InProcess | None = None, **request: Any) -> Any:
    given = ExperimentRequest(folder, out=folder.parent / "out", **request)
    return run_experiment(given, quiet(), worker or InProcess())


def _findings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results" / "findings.json").read_text())
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of two variants and three seeds that ended."""
    folder = _declare(tmp_path_factory.mktemp("experiment") / "rates", SCRATCH)
    assert _run(folder) is not None
    return folder


@pytest.fixture
def again(done: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(done.parent, tmp_path / "copy")
    return tmp_path / "copy" / done.name


def test_the_findings_say_what_was_declared_and_what_came_of_it(done: Path) -> None:
    found = _findings(done)
    declaration = read_declaration(done)
    assert found["declaration"]["hash"] == declaration.hash
    assert found["question"] == SCRATCH["question"]
    assert found["variants"]["slow"]["verdict"] in DECISION
    assert found["variants"]["slow"]["concluded"] == DECISION[found["variants"]["slow"]["verdict"]]
    assert len(found["runs"]) == 6
    assert {run["declaration"] for run in found["runs"].values()} == {declaration.hash}
    text = (done / "results" / READING).read_text()
    assert "take it" in text
    assert found["variants"]["slow"]["verdict"] in text
    assert "Again" in text
    assert str(done.parent) not in text.replace(found["command"], "")


def test_the_hash_is_in_every_run_from_its_start_and_written_before_it(done: Path, tmp_path: Path) -> None:
    folder = _declare(tmp_path / "rates", SCRATCH)
    register = tmp_path / "out" / "declaration.json"
    seen: list[str] = []

    def look(name: str) -> int | None:
        seen.append(json.loads(register.read_text())["hash"])
        return 130

    with pytest.raises(RunFailure):
        _run(folder, InProcess(before=look))
    assert set(seen) == {read_declaration(folder).hash} == {read_declaration(done).hash}, "it is not of a place"
    config = yaml.safe_load((done.parent / "out" / "runs" / "slow_seed1" / "config.yaml").read_text())
    assert config["declaration"] == read_declaration(done).hash


def test_the_same_command_runs_nothing_again_and_keeps_what_was_written_by_hand(again: Path) -> None:
    path = again / "results" / READING
    path.write_text(path.read_text().partition(KEPT)[0] + KEPT + "\n\nMy own words.\n")
    worker = InProcess()
    _run(again, worker)
    assert worker.started == []
    assert path.read_text().endswith("My own words.\n")


def test_a_rule_changed_after_the_first_run_is_refused_unless_it_says_why(again: Path) -> None:
    _declare(again, SCRATCH, protocol={"practical": 5.0})
    before = (again / "results" / "findings.json").read_text()
    with pytest.raises(UserError, match=r"changed after its first run \(protocol.practical: 0.1 then, 5.0 now"):
        _run(again, InProcess())
    assert (again / "results" / "findings.json").read_text() == before
    shutil.rmtree(again.parent / "out")
    with pytest.raises(UserError, match="changed after its first run"):
        _run(again, InProcess())  # the findings that are there tell it too
    with pytest.raises(UserError, match="says nothing"):
        _run(again, InProcess(), amend=" ")


def test_an_amendment_is_told_wherever_the_findings_are(again: Path) -> None:
    _declare(again, SCRATCH, protocol={"practical": 5.0})
    worker, console = InProcess(), quiet()
    request = ExperimentRequest(again, out=again.parent / "out", amend="0.1 % was below the text's noise")
    run_experiment(request, console, worker)
    assert worker.started == []
    assert "CHANGED AFTER THE FIRST RUN" in console.export_text()
    note = _findings(again)["declaration"]["amendments"][0]
    assert note["why"] == "0.1 % was below the text's noise"
    assert "practical" in note["changed"]
    assert "**Changed after the first run**" in (again / "results" / READING).read_text()
    _run(again, worker)
    assert len(_findings(again)["declaration"]["amendments"]) == 1


def test_a_declaration_may_change_before_the_first_run(tmp_path: Path) -> None:
    folder = _declare(tmp_path / "rates", SCRATCH)
    _run(folder, dry_run=True)
    assert not (tmp_path / "out").exists()
    _declare(folder, SCRATCH, protocol={"practical": 5.0})
    _run(folder, dry_run=True)
    with pytest.raises(UserError, match="nothing to amend"):
        _run(folder, amend="why not")


def test_a_failed_seed_is_told_and_the_others_are_used(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy" / "rates"
    shutil.copytree(done.parent, tmp_path / "copy")
    summary = tmp_path / "copy" / "out" / "runs" / "slow_seed1" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"status": "failed"}))
    with pytest.raises(RunFailure, match="slow_seed1"):
        _run(folder, InProcess(before=lambda name: 1))
    found = _findings(folder)
    assert found["runs"]["slow_seed1"]["status"] == "failed"
    assert found["failed"].keys() == {"slow_seed1"}
    assert any("1 of 3 runs did not finish (slow_seed1 failed)" in remark for remark in found["remarks"])
    assert found["variants"]["slow"]["verdict"] == "two seeds"
    assert "nothing" in found["variants"]["slow"]["concluded"]


def test_trying_out_leaves_no_findings_beside_the_declaration(tmp_path: Path) -> None:
    folder = _declare(tmp_path / "rates", SCRATCH)
    with pytest.raises(RunFailure):
        _run(folder, InProcess(before=lambda name: 1), extra=("train.steps=1",))
    assert not (folder / "results").exists()
    assert (tmp_path / "out" / "results" / "findings.json").is_file()


def test_findings_of_an_experiment_that_came_installed_stay_out_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moelab, "__file__", str(tmp_path / "moelab/__init__.py"))
    shipped = read_declaration(_declare(tmp_path / "moelab/configs/experiments/one", SCRATCH))
    own = read_declaration(_declare(tmp_path / "mine/one", SCRATCH))
    out = tmp_path / "runs"
    assert results_folder(shipped, out, tried=False) == out / "results"
    assert results_folder(own, out, tried=False) == tmp_path / "mine/one/results"
    assert results_folder(own, out, tried=True) == out / "results"


def test_variants_start_from_weights_that_are_prepared_for_each_seed(tmp_path: Path) -> None:
    folder = _declare(tmp_path / "upcycling", UPCYCLED)
    worker = InProcess()
    assert _run(folder, worker) is not None
    one = ["dense_seed{0}", "dense_seed{0}.hf", "sparse_seed{0}", "dense_on_seed{0}", "upcycled_seed{0}"]
    assert worker.started == [name.format(seed) for seed in range(3) for name in one]
    found = _findings(folder)
    assert found["variants"]["upcycled"]["pairs"] == 3, "conversion and source pair with the dense run of their seed"
    worker = InProcess()
    _run(folder, worker)
    assert worker.started == []
    shutil.rmtree(tmp_path / "out" / "prepared" / "upcycled" / "sparse_seed1")
    _run(folder, worker)
    assert worker.started == ["sparse_seed1"], "the same weights again, so what began with them stands"
    moved = tmp_path / "moved" / "upcycling"
    shutil.copytree(folder, moved)
    worker = InProcess()
    run_experiment(ExperimentRequest(moved, out=tmp_path / "out"), quiet(), worker)
    assert worker.started == [], "the same declaration elsewhere"
    stamp = tmp_path / "out" / "prepared" / "stamps" / "sparse_seed2.json"
    stamp.write_text(json.dumps({"hash": "of something else"}))
    with pytest.raises(RunFailure, match=r"sparse_seed2.*was made of something else"):
        _run(folder, worker)


def test_every_arm_is_checked_before_the_dense_model_is_trained(tmp_path: Path) -> None:
    wrong = {
        "upcycled": [*UPCYCLED["variants"]["upcycled"], "model.moe.router.nam=x"],
    }
    folder = _declare(tmp_path / "wrong", UPCYCLED, variants=UPCYCLED["variants"] | wrong)
    with pytest.raises(ConfigError, match=r"no such option.*upcycled_seed0"):
        _run(folder)
    other = {"upcycled": [*UPCYCLED["variants"]["upcycled"], "model.moe.router.name=sigmoid_topk"]}
    _declare(folder, UPCYCLED, variants=UPCYCLED["variants"] | other)
    with pytest.raises(ConfigError, match=r"model\.moe\.router\.name: is not as in the checkpoint.*init_overrides"):
        _run(folder)
    step = UPCYCLED["prepare"][1] | {"upcycle": [*UPCYCLED["prepare"][1]["upcycle"], "recipe.experts.name=qwen3"]}
    _declare(folder, UPCYCLED, prepare=[UPCYCLED["prepare"][0], step])
    with pytest.raises(ConfigError, match=r"qwen3.*did you mean 'qwen2'"):
        _run(folder)
    assert not (tmp_path / "out").exists()


def test_an_experiment_ends_where_it_is_decided_and_starts_no_further_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verdicts are given here: that they are right is tested where they are made."""
    verdicts = {3: ("not resolved", 0.5), 4: ("better", None)}
    worker = _judged(tmp_path, monkeypatch, verdicts, looks=[3, 4, 5])
    found = _findings(tmp_path / "rates")
    assert found["ended"] == "Decided at look 2 of 3, with 4 seeds."
    assert found["seeds"] == [0, 1, 2, 3]
    assert found["variants"]["slow"]["seeds_at_verdict"] == 4
    assert found["variants"]["slow"]["concluded"] == DECISION["better"]
    assert worker.started[-1] == "slow_seed3"


def test_an_experiment_gives_up_where_no_word_can_be_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = _judged(tmp_path, monkeypatch, {3: ("not resolved", 0.04)}, looks=[3, 5])
    ended = _findings(tmp_path / "rates")["ended"]
    assert ended.startswith("Given up at look 1 of 2, with 3 seeds: 5 seeds won't decide what is left")
    assert ended.endswith("(chance of a word: slow 4 %).")
    assert len(worker.started) == 6
    both: dict[int, tuple[str, float | None]] = {3: ("not resolved", 0.04), 5: ("worse", None)}
    worker = _judged(tmp_path, monkeypatch, both, looks=[3, 5], give_up=False)
    assert len(worker.started) == 10
    assert _findings(tmp_path / "rates")["ended"] == "Decided at look 2 of 2, with 5 seeds."


def test_a_budget_of_tokens_ends_an_experiment_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 2 * 2 * 32 * 2 * 3  # steps, batch, length, variants, seeds of the first look
    verdicts: dict[int, tuple[str, float | None]] = {3: ("not resolved", 0.5)}
    worker = _judged(tmp_path, monkeypatch, verdicts, looks=[3, 5], budget={"tokens": tokens})
    assert len(worker.started) == 6
    assert "The budget ended before 5 seeds" in _findings(tmp_path / "rates")["ended"]


def _judged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verdicts: dict[int, tuple[str, float | None]],
    *,
    looks: list[int],
    budget: dict[str, Any] | None = None,
    **protocol: Any,
) -> InProcess:
    """An experiment whose runs are not run and whose verdicts at each look are (word, prospect)."""
    from moelab_tools.experiments import conduct

    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    shutil.rmtree(tmp_path / "rates", ignore_errors=True)
    counts = iter(looks)

    def verdict(comparison: object, axis: str, variants: object) -> dict[str, Verdict]:
        word, chance = verdicts[next(counts)]
        plain = Verdict(word, -0.1, -0.2, 0.0, 0.1, None, "", "", 3, True, None, 1, 0.05, None, None, None)
        return {"slow": replace(plain, prospect=chance)}

    monkeypatch.setattr(conduct, "_verdicts", verdict)
    protocol |= {"looks": looks}
    folder = _declare(tmp_path / "rates", SCRATCH, seeds=f"0..{looks[-1] - 1}", protocol=protocol, budget=budget or {})
    worker = InProcess(before=lambda name: 0)
    with pytest.raises(RunFailure):  # there is nothing to compare
        _run(folder, worker)
    return worker
