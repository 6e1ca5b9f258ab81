"""What stands for a checkpoint on the command line: a path, or a name on the hub that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moelab
from moelab import hub
from moelab.config.model import ModelConfig
from moelab.hf.save import save_hf
from moelab_tools.cli import run

MODEL = ModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "nowhere", "--practical"], ["sweep", "nowhere", "--practical"], ["coefficient"],
        ["synthesise", "nowhere", "--reward", "x", "--out", "x", "--right"],
        ["synthesise", "nowhere", "--reward", "x", "--out", "x", "--wrong"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("number", ["nan", "inf"])
def test_what_is_no_finite_number_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], number: str
) -> None:
    """Not a number is in every range of click's."""
    monkeypatch.chdir(tmp_path)
    assert run([*words, number]) == 2
    told = capsys.readouterr().err
    assert f"{number} is no finite number" in told or f"{number} is not in the range" in told
    assert not list(tmp_path.iterdir())


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """(name, revision) of each model that the hub was asked for; it has my-org/small."""
    save_hf(moelab.build(MODEL, seed=3), tmp_path / "commit")
    names: list[tuple[str, str | None]] = []

    def snapshot(kind: str, name: str, revision: str | None, *filters: Any) -> Path:
        names.append((name, revision))
        if name != "my-org/small":
            raise OSError(f"not to be had from the Hugging Face hub; with a network: hf download {name}")
        return tmp_path / "commit"

    monkeypatch.setattr(hub, "_snapshot", snapshot)
    monkeypatch.chdir(tmp_path)
    return names


Asked = list[tuple[str, str | None]]


def test_a_name_that_says_so_is_a_checkpoint(asked: Asked, tmp_path: Path) -> None:
    assert run(["export", "hf://my-org/small@v2", "out"]) == 0
    assert (tmp_path / "out/model.safetensors").exists()
    assert asked == [("my-org/small", "v2")]


@pytest.mark.parametrize("command", ["evaluate", "generate", "chat", "export", "trace", "replay", "ablate", "surgery"])
def test_what_is_not_to_be_had_is_refused_with_what_to_do(
    asked: Asked, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "hf://my-org/absent", "there"]) == 2
    assert "hf download my-org/absent" in capsys.readouterr().err
    assert asked == [("my-org/absent", None)]


@pytest.mark.parametrize("name", ["hf://small", "hf://my-org/small/more", "hf://my org/small"])
def test_what_is_no_name_is_told_how_one_is_written(
    asked: Asked, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", name]) == 2
    assert "hf://ORG/NAME" in capsys.readouterr().err
    assert not asked


def test_a_path_that_looks_like_a_name_is_not_asked_of_the_hub(
    asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", "my-org/small", "out"]) == 2
    assert "my-org/small" in capsys.readouterr().err
    assert not asked
