"""Runs of configs with traps: `~`, `${...}` and the environment, from the command to what lies in the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import moelab
from moelab.config.load import load_config
from moelab.config.run import RunConfig
from moelab.manifest import MANIFEST, manifest_bytes, plain_entry
from moelab.training.trainer import train
from moelab_tools.cli import run

SECRET = "hunter2-of-the-environment"
QUICK = [
    "train.steps=2", "train.batch_size=2", "train.sequence_length=16", "train.threads=1", "schedule.warmup_steps=0",
    "model.num_hidden_layers=1", "evaluation.sequences=2", "evaluation.sample_tokens=2", "evaluation.prompts=[a]",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder and a home folder with some text in it."""
    home, current = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    current.mkdir()
    lines = [json.dumps({"text": f"{word} {number} " * 20}) for number in range(30) for word in ("router", "expert")]
    (home / "a.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(current)
    return current


def _config(here: Path, **more: str) -> str:
    keys = {"run_dir": "~/run", "data": "{source: {name: jsonl, paths: [~/a.jsonl]}}"} | more
    (here / "mine.yaml").write_text("base: train/tiny_moe\n" + "".join(f"{k}: {v}\n" for k, v in keys.items()))
    return "mine.yaml"


def test_a_tilde_is_home_in_every_path_of_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = here.parent / "home"
    assert run(["train", _config(here), *QUICK]) == 0
    assert (home / "run" / "summary.json").is_file()
    commands = [
        ["train", "mine.yaml", *QUICK, "run_dir=~/run2", "train.init_from=~/run"],
        ["train", "mine.yaml", *QUICK, "--resume"],
        ["generate", "~/run", "--tokens", "2"],
        ["evaluate", "~/run"],
        ["export", "~/run", "~/exported"],
        ["evaluate", "~/exported", "mine.yaml", *QUICK, "data.tokenizer=~/exported"],
        ["generate", "~/exported", "--tokenizer", "~/exported/tokenizer.json", "--tokens", "2"],
        ["compare", "~/run", "~/run2", "--baseline", "~/run", "--output", "~/report", "--json", "~/report.json"],
        ["explain", "~/run/config.yaml"],
        ["train", "~/run/config.yaml", "run_dir=~/run3"],
    ]
    for command in commands:
        assert run(command) == 0, (command, capsys.readouterr().err)
    assert {"run", "run2", "run3", "exported", "report", "report.json"} <= {path.name for path in home.iterdir()}
    assert [path.name for path in here.iterdir()] == ["mine.yaml"]
    assert "~/a.jsonl" in (home / "run" / "config.yaml").read_text()  # as written: another home, another user


def test_a_tilde_is_home_in_python_too(here: Path) -> None:
    config = load_config([_config(here), *QUICK], RunConfig).config
    config.run_dir = "~/run"
    assert train(config) == here.parent / "home" / "run"
    assert isinstance(moelab.load("~/run"), torch.nn.Module)
    assert [path.name for path in here.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "mine.yaml", *QUICK, "run_dir=~nobody_here/run"],
        ["train", "mine.yaml", *QUICK, "data.tokenizer=~nobody_here/t"],
        ["train", "mine.yaml", *QUICK, "train.init_from=~nobody_here/t"],
        ["train", "mine.yaml", *QUICK, "data.source.paths=[~nobody_here/a]"],
        ["generate", "~nobody_here/run"],
        ["compare", "~nobody_here/run"],
        ["explain", "~nobody_here/a.yaml"],
    ],
)
def test_the_home_of_nobody_is_refused(here: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _config(here)
    assert run(arguments) == 2
    assert "~nobody_here" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["mine.yaml"]


def test_names_that_look_like_markup_are_names(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", _config(here), *QUICK, "run_dir=x[/b]", "name='[/red]'"]) == 0
    shown = capsys.readouterr().out
    assert "[/red]: " in shown
    assert "done: x[/b]" in shown


def test_nothing_of_the_environment_lies_in_a_run_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = here.parent / "home"
    (home / SECRET).mkdir()
    (home / "a.jsonl").rename(home / SECRET / "a.jsonl")
    monkeypatch.setenv("MOELAB_SECRET", SECRET)
    monkeypatch.setenv("MOELAB_STEPS", "2")
    source = "{source: {name: jsonl, paths: ['~/${oc.env:MOELAB_SECRET}/a.jsonl']}}"
    config = _config(here, name="n-${oc.env:MOELAB_SECRET}", data=source, seed="${oc.env:MOELAB_STEPS}")
    assert run(["train", config, *QUICK]) == 0
    assert "stored as written" in (home / "run" / "log.txt").read_text()
    held = [path for path in (home / "run").rglob("*") if path.is_file()]
    assert len(held) > 8
    assert not [path for path in held if SECRET.encode() in path.read_bytes()]
    for command in (
        ["generate", "~/run", "--tokens", "2"],
        ["export", "~/run", "~/hf"],
        ["train", config, *QUICK, "--resume"],
    ):
        assert run(command) == 0, capsys.readouterr().err
    assert run(["evaluate", "~/run"]) == 2
    assert "${oc.env:MOELAB_STEPS}" in capsys.readouterr().err
    assert run(["evaluate", "~/run", config, *QUICK]) == 0
    monkeypatch.setenv("MOELAB_STEPS", "3")
    capsys.readouterr()
    assert run(["train", config, *QUICK, "--resume"]) == 2
    assert "another environment: what seed," in capsys.readouterr().err.replace("data.source.paths.0, seed", "seed,")


def test_a_strangers_run_folder_asks_no_variable(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = here.parent / "home"
    assert run(["train", _config(here), *QUICK]) == 0
    for path in (home / "run" / "config.yaml", home / "run" / "checkpoints" / "step_00000002" / "config.yaml"):
        path.write_text(path.read_text().replace("name: tiny_moe", "name: ${oc.env:MOELAB_SECRET}"))
    manifest = path.with_name(MANIFEST)  # a stranger writes one that agrees
    files = json.loads(manifest.read_text())["files"]
    manifest.write_bytes(manifest_bytes(files | {path.name: plain_entry(path.read_bytes())}))
    monkeypatch.setenv("MOELAB_SECRET", SECRET)
    capsys.readouterr()
    commands = [
        ["generate", "~/run", "--tokens", "2"], ["evaluate", "~/run"], ["export", "~/run", "~/hf"],
        ["explain", "~/run/config.yaml"], ["train", "~/run/config.yaml", "run_dir=~/mine"],
        ["compare", "~/run", "~/mine", "--output", "~/report"],
    ]  # fmt: skip
    for command in commands:
        assert run(command) == 0, (command, capsys.readouterr().err)
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err
    assert not [path for path in home.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
