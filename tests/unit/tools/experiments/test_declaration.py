"""experiment.yaml: what is refused by its key, and what its hash is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from later_keys import later
from moelab.errors import ConfigError
from moelab_tools.experiments.declaration import (
    ExperimentConfig,
    Protocol,
    Step,
    read_declaration,
    reference,
)
from moelab_tools.experiments.logged import Logged

DECLARED: dict[str, Any] = {
    "question": "Does it matter?",
    "variants": {"a": [], "b": ["optimizer.lr=1e-4"]},
    "baseline": "a",
    "seeds": "0..4",
    "decision": {word: word for word in ("better", "worse", "negligible", "not resolved")},
}


def _write(folder: Path, declared: dict[str, Any]) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(declared, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"questoin": "?"}, r"questoin: no such key, did you mean 'question'"),
        ({"variants": {"a": []}}, r"variants: 1; a comparison takes two"),
        ({"variants": {"a": [], "b c": []}}, r"variants\.b c: a name is of letters"),
        ({"variants": {"a": [], "b": "x=1"}}, r"variants\.b: must be a list"),
        ({"variants": {"a": [], "b": ["seed=3"]}}, r"variants\.b: seed follows from `seeds`"),
        ({"variants": {"a": [], "b": ["data.order_seed=3"]}}, r"data\.order_seed follows"),
        ({"variants": {"a": [], "b": ["run_dir=x"]}}, r"run_dir is what an experiment sets"),
        ({"variants": {"a": [], "b": ["train.init_from=@dnse"]}}, r"@dnse names no step of `prepare`"),
        ({"variants": {"a": [], "b": ["no_such_file"]}}, r"no_such_file: no such config file"),
        ({"baseline": "aa"}, r"baseline: no variant 'aa', did you mean 'a'"),
        ({"seeds": "0..1"}, r"seeds: 2; there is no verdict below 3"),
        ({"seeds": [0, 1, 1]}, r"seeds: \[0, 1, 1\]: whole numbers from 0, each once"),
        ({"seeds": "4..0"}, r"seeds: the range 4\.\.0 runs down"),
        ({"protocol": {"looks": [2, 5]}}, r"protocol\.looks"),
        ({"protocol": {"looks": [3, 4]}}, r"protocol\.looks.*end with all 5"),
        ({"protocol": {"looks": [4, 3, 5]}}, r"protocol\.looks.*rising"),
        ({"protocol": {"axis": "token"}}, r"protocol\.axis: no 'token', did you mean 'tokens'"),
        ({"protocol": {"spending": "all"}}, r"protocol\.spending"),
        ({"protocol": {"error": 0.6}}, r"protocol\.error"),
        ({"protocol": {"practical": -1}}, r"protocol\.practical"),
        ({"protocol": {"alpha": 0.05}}, r"protocol\.alpha: no such key"),
        ({"match": "actve"}, r"match: no 'actve', did you mean 'active'"),
        ({"budget": {"runs": 9}}, r"budget\.runs: 9; variants times seeds are 10"),
        ({"decision": {"better": "x"}}, r"decision: says nothing of worse, negligible, not resolved"),
        (
            {"decision": DECLARED["decision"] | {"beter": "x"}},
            r"decision: 'beter' is no verdict, did you mean 'better'",
        ),
        ({"prepare": [{"name": "d"}]}, r"prepare\.0: d takes one of train, upcycle, align, data"),
        ({"prepare": [{"name": "a", "train": []}]}, r"prepare\.0\.name: 'a' must be a name of its own"),
        ({"prepare": [{"name": "d", "upcycle": []}]}, r"prepare\.0\.source: names the earlier step.*none yet"),
        ({"prepare": [{"name": "d", "train": [], "source": "e"}]}, r"train\.init_from=@e"),
        ({"prepare": [{"name": "d", "data": [], "align": []}]}, r"prepare\.0: d takes one of train, upcycle, align"),
        ({"prepare": [{"name": "a_1", "align": ["train.init_from=@b_1"]}]}, r"prepare\.0\.a_1: .*no step of `prepare`"),
        (
            {"prepare": [{"name": "text", "data": []}], "configs": ["train.init_from=@text"]},
            r"train\.init_from=@text names a corpus, and weights are wanted",
        ),
        (
            {"prepare": [{"name": "text", "data": []}], "configs": ["data.source.path=@texts/tokens"]},
            r"data\.source\.path=@texts/tokens names no step of `prepare`, did you mean 'text'",
        ),
        ({"logged": {}}, r"logged: give names of what is logged"),
        ({"logged": {"names": ["x"], "last": 0}}, r"logged: .*first and last of at least 1"),
        ({"logged": {"names": ["x"], "lst": 2}}, r"logged\.lst: no such key, did you mean 'last'"),
        ({"files": ["nothing.jsonl"]}, r"nothing\.jsonl.*put it beside the declaration"),
    ],
)
def test_a_declaration_that_can_not_be_meant_is_refused_by_its_key(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        read_declaration(_write(tmp_path, DECLARED | change))


def test_the_hash_is_of_what_is_said_and_not_of_how_or_where(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "shared.yaml").write_text("train: {steps: 3}\n")
    declared = DECLARED | {"configs": ["shared.yaml"]}
    first = read_declaration(_write(here, declared)).hash
    path = _write(there, dict(reversed(declared.items())))
    path.write_text("# a comment\n" + path.read_text())
    assert read_declaration(there).hash == first
    (there / "shared.yaml").write_text("# another\ntrain:\n  steps: 3\n")
    assert read_declaration(there).hash == first
    (there / "shared.yaml").write_text("train: {steps: 4}\n")
    assert read_declaration(there).hash != first
    decision = DECLARED["decision"] | {"worse": "never mind"}
    assert read_declaration(_write(here, declared | {"decision": decision})).hash != first


def test_any_override_may_name_what_a_step_made() -> None:
    assert reference("train.init_from=@dense") == "dense"
    assert reference("data.source.path = @corpus/tokens") == "corpus"
    assert reference("optimizer.algorithm.reference=@sft") == "sft"
    assert reference("data.source.path=somebody@somewhere") is None
    assert reference("@dense") is None


def test_what_is_not_asked_for_is_not_hashed_and_the_data_that_configs_name_are(tmp_path: Path) -> None:
    bare = read_declaration(_write(tmp_path, DECLARED)).hash
    assert read_declaration(_write(tmp_path, DECLARED | {"logged": None, "files": [], "lengths": None})).hash == bare
    assert read_declaration(_write(tmp_path, DECLARED | {"logged": {"names": ["train/lm_loss"]}})).hash != bare
    (tmp_path / "pairs.jsonl").write_text("{}")
    first = read_declaration(_write(tmp_path, DECLARED | {"files": ["pairs.jsonl"]})).hash
    (tmp_path / "pairs.jsonl").write_text("{ }")
    assert len({bare, first, read_declaration(tmp_path).hash}) == 3


def test_a_key_that_came_later_is_hashed_where_a_declaration_uses_it(tmp_path: Path) -> None:
    step, logged = {"name": "made", "data": ["x.yaml"]}, {"names": ["train/lm_loss"]}
    (tmp_path / "x.yaml").write_text("{}")
    whole = DECLARED | {"prepare": [step], "logged": logged, "protocol": {"practical": 0.2}}
    before = read_declaration(_write(tmp_path, whole)).hash
    with (
        later(ExperimentConfig, "later", "float", 0.5),
        later(Step, "later", "float", 0.5),
        later(Protocol, "later", "list[int] | None", None),
        later(Logged, "later", "float", 0.5),
    ):
        assert read_declaration(_write(tmp_path, whole)).hash == before
        used = [
            {"later": 1},
            {"prepare": [step | {"later": 1}]},
            {"logged": logged | {"later": 1}},
            {"protocol": {"practical": 0.2, "later": []}},
        ]
        hashes = {read_declaration(_write(tmp_path, whole | one)).hash for one in used}
        assert len(hashes | {before}) == 5


def test_an_experiment_is_found_by_folder_file_and_shipped_name(tmp_path: Path) -> None:
    path = _write(tmp_path, DECLARED)
    assert read_declaration(path).name == read_declaration(tmp_path).name == tmp_path.name
    assert read_declaration("shared_expert").config.baseline == "shared"
    with pytest.raises(ConfigError, match=r"no such experiment.*shared_expert"):
        read_declaration(tmp_path / "nothing")


def test_a_shipped_experiment_is_found_as_a_checkout_and_as_a_wheel_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_declaration("configs/experiments/shared_expert") == read_declaration("shared_expert")
