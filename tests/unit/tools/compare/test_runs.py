"""Reading run folders: what is there comes back, what is broken is named with its cure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from moelab.errors import UserError
from moelab_tools.compare.runs import read_run, read_runs
from moelab_tools.compare.variants import group_by_seed

MakeRun = Callable[..., Path]


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("".join(line + "\n" for line in change(path.read_text().splitlines())))


def test_a_finished_run_is_read_whole(make_run: MakeRun) -> None:
    run = read_run(make_run("a", steps=60, eval_every=20))
    assert run.finished
    assert run.name == "a"
    assert run.curve("eval/loss")[0] == [0, 20 * 4096, 40 * 4096, 60 * 4096]
    assert len(run.curve("train/lm_loss", "flops")[0]) == 12
    assert len(run.documents) == 60
    assert run.amount("tokens") == 60 * 4096


def test_train_and_eval_lines_of_a_step_share_a_row(make_run: MakeRun) -> None:
    run = read_run(make_run("a", steps=60))
    (row,) = [row for row in run.rows if row["step"] == 60]
    assert {"train/loss", "eval/loss"} <= set(row)


def test_steps_written_again_after_a_resume_replace_the_first(make_run: MakeRun) -> None:
    path = make_run("a", steps=60, eval_every=0) / "metrics.jsonl"
    again = {"step": 40, "tokens": 40 * 4096, "flops": 1.0, "seconds": 1.0, "train/lm_loss": 9.0}
    edit(path, lambda lines: [*lines, json.dumps(again)])
    tokens, losses = read_run(path.parent).curve("train/lm_loss")
    assert tokens[-1] == 40 * 4096
    assert losses[-1] == 9.0


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "evaluation_documents.jsonl"])
def test_a_missing_file_is_named_with_the_cure(make_run: MakeRun, name: str) -> None:
    path = make_run("a")
    (path / name).unlink()
    with pytest.raises(UserError, match=f"(?s){name}.*(leave this run out|run_dir)"):
        read_run(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "model: [1"),
        ("config.yaml", "just text"),
        ("summary.json", '{"status": "fin'),
        ("summary.json", "{}"),
        ("metrics.jsonl", '{"step": 1\n{"step": 2}\n'),
        ("metrics.jsonl", '{"step": 1}\n'),
        ("metrics.jsonl", "[1]\n"),
        ("metrics.jsonl", ""),
        ("evaluation_documents.jsonl", '{"document": "a"}\n'),
        ("evaluation_documents.jsonl", ""),
        ("evaluation_documents.jsonl", '{"document":"a","domain":"d","nats":NaN,"tokens":3}\n'),
        ("evaluation_documents.jsonl", '{"document":"a","domain":"d","nats":1,"tokens":3}\n' * 2),
    ],
)
def test_a_broken_file_is_named_with_the_cure(make_run: MakeRun, name: str, content: str) -> None:
    path = make_run("a")
    (path / name).write_text(content)
    with pytest.raises(UserError, match=f"(?s){name}.*leave this run out, or train it again"):
        read_run(path)


def test_binary_garbage_is_a_user_error(make_run: MakeRun) -> None:
    path = make_run("a")
    (path / "metrics.jsonl").write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_run(path)


def test_a_killed_run_is_read_as_unfinished_and_its_torn_line_forgiven(make_run: MakeRun) -> None:
    path = make_run("a", status="killed")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 305, "tok')
    run = read_run(path)
    assert run.status == "unfinished"
    assert run.rows[-1]["step"] == 300
    assert "torn" in run.warnings[0]


def test_a_folder_of_runs_is_pointed_out(make_run: MakeRun) -> None:
    folder = make_run("a").parent
    make_run("b")
    with pytest.raises(UserError, match=r"holds the runs a, b: give .*/\*"):
        read_run(folder)


def test_an_absent_folder_and_a_run_given_twice_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        read_run(tmp_path / "nothing")
    path = make_run("a")
    with pytest.raises(UserError, match="twice"):
        read_runs([path, path.parent / "." / "a"])


def test_runs_of_one_name_are_told_apart(make_run: MakeRun, tmp_path: Path) -> None:
    first = make_run("a")
    second = tmp_path / "other" / "a"
    second.parent.mkdir()
    first.rename(second)
    assert [run.name for run in read_runs([make_run("a"), second])] == ["runs/a", "other/a"]


def test_documents_without_bytes_are_accepted(make_run: MakeRun) -> None:
    path = make_run("a")
    edit(
        path / "evaluation_documents.jsonl",
        lambda lines: [json.dumps({k: v for k, v in json.loads(line).items() if k != "bytes"}) for line in lines],
    )
    assert {document.bytes for document in read_run(path).documents.values()} == {None}


def test_a_folder_of_a_newer_format_is_refused(make_run: MakeRun) -> None:
    path = make_run("future") / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(UserError, match="has format_version 99, and this moelab reads up to "):
        read_run(path.parent)


def test_a_run_from_before_a_key_is_another_seed_of_the_same_recipe(make_run: MakeRun) -> None:
    runs = [make_run("a_seed0", seed=0), make_run("a_seed1", seed=1), make_run("a_seed2", seed=2)]
    for folder, compiled in zip(runs[1:], ("false", "true"), strict=True):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config.setdefault("train", {})["compile"] = yaml.safe_load(compiled)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    groups = [[run.name for run in variant.runs] for variant in group_by_seed(read_runs(runs))]
    assert groups == [["a_seed0", "a_seed1"], ["a_seed2"]]
