"""The table of architectures, as a user sees it."""

from __future__ import annotations

import json

import pytest

from moelab_tools.cli import run


def test_the_table_shows_every_shipped_model_with_exact_counts(capsys: pytest.CaptureFixture[str]):
    assert run(["architectures"]) == 0
    shown = capsys.readouterr().out
    for text in ("qwen2-0.5b", "qwen2-57b-a14b", "57,408,658,944", "14,249,270,784", "72,706,203,648", "20,480"):
        assert text in shown


def test_json_has_the_same_rows_smallest_model_first(capsys: pytest.CaptureFixture[str]):
    assert run(["architectures", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert list(table) == [
        "qwen2-0.5b", "qwen2-1.5b", "qwen2-7b", "deepseek-v2-lite", "gpt-oss-20b", "qwen3-30b-a3b", "mixtral-8x7b",
        "qwen2-57b-a14b", "qwen2-72b", "deepseek-v3",
    ]  # fmt: skip
    moe = table["qwen2-57b-a14b"]
    assert (moe["num_experts"], moe["num_experts_per_tok"], moe["moe_intermediate_size"]) == (64, 8, 2560)
    assert moe["shared_expert_intermediate_size"] == 20480
    assert table["qwen2-7b"]["num_experts"] is None
    assert table["deepseek-v3"]["cached_numbers"] == 61 * (512 + 64)


def test_chosen_configs_alone(capsys: pytest.CaptureFixture[str]):
    assert run(["architectures", "model/qwen2-7b", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["qwen2-7b"]


def test_a_config_that_is_not_there_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]):
    assert run(["architectures", "qwen9"]) == 2
    assert "qwen9: no such config file" in capsys.readouterr().err
