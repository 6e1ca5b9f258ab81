"""Conditions and sort keys over fields and configs."""

from __future__ import annotations

from pathlib import Path

import pytest

import moelab
from moelab.errors import UserError
from run_folders import finished_run, write_run

SWITCH = {"model": {"moe": {"router": {"name": "switch"}}}, "seed": 1}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    finished_run(tmp_path / "a", 3.0)
    finished_run(tmp_path / "b", 2.0, SWITCH)
    layered = {"model": {"moe": {"layers": {"0": {"router": {"name": "switch"}}}}}}
    finished_run(tmp_path / "c", 10.0, layered | {"seed": 2, "train": {"init_from": "x/y"}})
    write_run(tmp_path / "d", {"model": {"moe": None}}, summary={"status": "failed", "steps": 0})
    return tmp_path


@pytest.mark.parametrize(
    ("conditions", "names"),
    [
        (["model.moe.router.name=switch"], "b"), (["router.name=switch"], "b"), (["router=switch"], "b"),
        (["router!=switch"], "acd"), (["loss<3"], "b"), (["loss<=3.0", "seed=1"], "b"), (["seed>=1"], "bc"),
        (["state=failed"], "d"), (["state=f*"], "abcd"), (["name=[ab]"], "ab"), (["seed=1.0"], "b"),
        (["model.moe=null"], "d"), (["init_from=x/*"], "c"), (["norm_topk_prob=false"], "ac"),
        (["loss>1e400"], ""), (["loss=nan"], ""), (["train.steps = 30"], "abcd"),
    ],
)  # fmt: skip
def test_a_condition_reads_fields_and_configs(runs: Path, conditions: list[str], names: str) -> None:
    found = moelab.run_records(runs, where=conditions)
    assert "".join(record.name for record in found) == names


@pytest.mark.parametrize(
    ("key", "reverse", "names"),
    [("loss", False, "bacd"), ("loss", True, "cabd"), ("seed", True, "cbad"), ("router.name", False, "acbd")],
)
def test_what_has_no_value_is_sorted_last_either_way(runs: Path, key: str, reverse: bool, names: str) -> None:
    assert "".join(r.name for r in moelab.run_records(runs, sort_by=key, reverse=reverse)) == names


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        ("model.moe.ruoter.name=x", "did you mean 'model.moe.router.name'"), ("loss", "write KEY=VALUE"),
        ("name.=x", "no run here has a key"), ("batch_size=4", "may mean train.batch_size, evaluation.batch_size"),
    ],
)  # fmt: skip
def test_a_key_that_no_run_has_is_a_mistake(runs: Path, condition: str, told: str) -> None:
    with pytest.raises(UserError, match="--where") as caught:
        moelab.run_records(runs, where=[condition])
    assert told in str(caught.value)


def test_a_place_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        moelab.run_records(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such folder"):
        moelab.run_records(f"{tmp_path}/*")
    (tmp_path / "file").write_text("")
    assert moelab.run_records(f"{tmp_path}/*") == []


def test_without_pandas_one_line_says_what_to_do(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(UserError, match=r"moelab\[notebook\].*run_records"):
        moelab.runs(runs)
