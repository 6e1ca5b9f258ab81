"""A run with a mixer: told, logged, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moelab_tools.cli import run as moelab

WORDS = {"few": 4, "many": 40, "some": 16}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    for domain, count in WORDS.items():
        (folder / domain).mkdir()
        for number in range(count):
            text = " ".join(f"{domain}{number}-{n * n % 97}" for n in range(60))
            (folder / domain / f"{number}.txt").write_text(text)
    return folder


def train(library: Path, folder: Path, *words: str) -> int:
    base = ["train/tiny_moe", f"data.source={{name: text, paths: [{library}]}}", f"run_dir={folder}",
            "train.sequence_length=32", "train.batch_size=4", "train.log_every=2", "train.save_every=2",
            "train.steps=6", "evaluation.sequences=4", "evaluation.prompts=[]", "observers=[]"]  # fmt: skip
    return moelab(["train", *base, *words])


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


EQUAL = "data.mixer={name: weights, weights: {few: 1, many: 1, some: 2}}"


def test_shares_are_logged_and_what_repeats_is_told(library: Path, tmp_path: Path) -> None:
    assert train(library, tmp_path / "run", EQUAL, "train.steps=80") == 0
    last = [line for line in logged(tmp_path / "run") if "data/read/few" in line][-1]
    assert last["data/read/some"] == pytest.approx(0.5, abs=0.01)
    assert last["data/asked/some"] == 0.5 and last["data/epochs/few"] > 1
    assert "text that is read more than once in 80 steps: few" in (tmp_path / "run/log.txt").read_text()
    planned = json.loads((tmp_path / "run/summary.json").read_text())["data"]["mixture"]
    assert {name: entry["asked"] for name, entry in planned.items()} == {"few": 0.25, "many": 0.25, "some": 0.5}


def test_a_resumed_run_reads_what_it_would_have_read(library: Path, tmp_path: Path) -> None:
    assert train(library, tmp_path / "whole", EQUAL) == 0
    assert train(library, tmp_path / "parts", EQUAL, "train.steps=4") == 0
    assert train(library, tmp_path / "parts", EQUAL, "--resume") == 0
    losses = [[line["train/loss"] for line in logged(tmp_path / name) if "train/loss" in line]
              for name in ("whole", "parts")]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_another_length_is_refused_where_it_would_change_the_shares(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capped = "data.mixer={name: balanced, max_epochs: 0.05}"
    assert train(library, tmp_path / "run", capped, "train.steps=4") == 0
    capsys.readouterr()
    assert train(library, tmp_path / "run", capped, "train.steps=60", "--resume") == 2
    assert "was trained with other shares of the domains" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("mixer", "said"),
    [
        ("{name: weights, weights: {fiw: 1}}", "data.mixer: no domain 'fiw' in the training text, did you mean 'few'"),
        ("{name: wights}", "data.mixer.name: no mixer 'wights', did you mean 'weights'?"),
        ("{name: temperature, temperature: 0.5}", "temperature: 0.5 is no number from 1 up"),
    ],
)
def test_a_mixture_that_can_not_be_served_leaves_nothing(
    mixer: str, said: str, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(library, tmp_path / "run", f"data.mixer={mixer}") == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()
