"""`moelab coefficient`: the same added to the loss, in seven programs' words."""

from __future__ import annotations

import json

import pytest

from moelab_tools.cli import run as moelab

SIZES = ["--top-k", "4", "--layers", "6"]


def test_a_coefficient_converts_by_what_perfect_balance_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert moelab(["coefficient", "0.01", "--from", "megatron", *SIZES, "--json"]) == 0
    told = {row["convention"]: row for row in json.loads(capsys.readouterr().out)["to"]}
    balanced = {"moelab": 1, "huggingface": 4, "megatron": 6, "megablocks": 1, "deepspeed": 6, "mesh": 6, "t5x": 4}
    assert set(told) == set(balanced)
    for name, cost in balanced.items():
        assert told[name]["coefficient"] * cost == pytest.approx(0.01 * 6)
    assert {name for name, row in told.items() if row["inexact"]} == {"huggingface", "mesh"}


def test_the_model_says_how_many_experts_and_layers(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["coefficient", "0.01", "--from", "megatron", "--to", "t5x", "--json", "--model", "model/qwen2-57b-a14b"]
    assert moelab(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["top_k"], found["layers"]) == (8, 28)
    assert found["to"][0]["coefficient"] == pytest.approx(0.01 * 28 / 8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--from", "megatrn", *SIZES], "did you mean 'megatron'"),
        ([], "--model CONFIG, or --top-k and --layers"),
        (["--model", "model/qwen2-7b"], "is dense"),
    ],
)
def test_what_is_missing_or_misspelt_is_named(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert moelab(["coefficient", "0.01", *given]) == 2
    assert said in capsys.readouterr().err
