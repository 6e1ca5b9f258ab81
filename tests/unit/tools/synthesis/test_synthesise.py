"""Answers judged: what becomes a line to learn from, what a pair, what is told of the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from moelab.alignment.examples import Shaping, read_examples
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.chat import ChatTemplate
from moelab.errors import ConfigError, DataError, UserError
from moelab_tools.cli import moelab as program
from moelab_tools.synthesis.command import Asking, synthesise
from moelab_tools.synthesis.rejection import Rule

ENDED, CUT = "ended at <|endoftext|> (256), as the tokenizer says", "64 tokens without <|endoftext|> (256) of x"


def said(prompt: str, text: str, sample: int = 0, ended: str = ENDED, **more: Any) -> dict[str, Any]:
    return {
        "prompt": prompt, "text": prompt + text, "sample": sample, "checkpoint": "runs/a", "ended": ended,
        "tokens": len(text), **more,
    }  # fmt: skip


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make(tmp_path: Path, rows: list[Any], reward: str = "exact_answer", **rule: Any) -> Path:
    synthesise(Asking([write(tmp_path / "said.jsonl", rows)], reward), Rule(**rule), tmp_path / "out")
    return tmp_path / "out"


ROWS = [
    *(said("2+2=", text, n, answer=4) for n, text in enumerate(("5", "4.0", "4", "4", "3"))),
    said("1+1=", "3", answer=2),
    said("0+1=", "1", answer=1),
    said("9+9=", "18", ended=CUT, answer=18),
]


def test_right_answers_are_learned_and_set_against_wrong_ones_with_where_they_are_from(tmp_path: Path) -> None:
    out = make(tmp_path, ROWS)
    sft, pairs = rows_of(out / "sft.jsonl"), rows_of(out / "pairs.jsonl")
    assert [(row["prompt"], row["completion"]) for row in sft] == [("2+2=", "4"), ("0+1=", "1")]
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("4", "5")]
    source = pairs[0]["source"]
    assert source["from"] == [f"{tmp_path}/said.jsonl:3", f"{tmp_path}/said.jsonl:1"]
    assert source["worth"] == [1.0, 0.0] and source["checkpoint"] == ["runs/a"] * 2
    assert source["reward"][0]["name"] == "exact_answer" and source["step"] == "rejection_sampling"
    account = json.loads((out / "synthesis.json").read_text())
    counts = {"prompts": 4, "answers": 8, "distinct": 7, "right": 3, "unsolved": 2, "all_right": 1, "cut": 1}
    assert counts.items() <= account.items() and (account["sft"], account["pairs"]) == (2, 1)


def test_more_of_a_prompt_may_be_kept_and_wrong_ones_bounded(tmp_path: Path) -> None:
    out = make(tmp_path, ROWS, answers=9, pairs=9)
    assert [row["completion"] for row in rows_of(out / "sft.jsonl")] == ["4", "4.0", "1"]
    chosen = [(row["chosen"], row["rejected"]) for row in rows_of(out / "pairs.jsonl")]
    assert chosen == [("4", "5"), ("4.0", "5"), ("4", "3"), ("4.0", "3")]
    graded = "{name: length, unit: characters, most: 1, slack: 3}"
    rows = [said("a", text, n) for n, text in enumerate(("x", "xx", "xxxxx"))]
    (tmp_path / "more").mkdir()
    out = make(tmp_path / "more", rows, graded, wrong=0.1, pairs=9)
    assert [(row["chosen"], row["rejected"]) for row in rows_of(out / "pairs.jsonl")] == [("x", "xxxxx")]


def test_code_that_ran_right_is_learned(tmp_path: Path) -> None:
    tests = ">>> twice(2)\n4\n"
    rows = [said("Write twice.", f"def twice(x): return x {how} 2", tests=tests) for how in "*-"]
    out = make(tmp_path, rows, "{name: doctest, allow_code_execution: true}")
    (pair,) = rows_of(out / "pairs.jsonl")
    assert "* 2" in pair["chosen"] and "- 2" in pair["rejected"]


def test_what_is_made_can_be_learned_from_as_it_is_conversations_too(tmp_path: Path) -> None:
    ask = [{"role": "user", "content": "two and two?"}]
    rows = [said("<rendered>", text, n, messages=ask, answer="four") for n, text in enumerate(("four", "five"))]
    out = make(tmp_path, rows)
    template = ChatTemplate.chatml(ByteTokenizer())
    for name, stage in (("sft", "sft"), ("pairs", "dpo")):
        found = read_examples(out / f"{name}.jsonl", Shaping(stage, template, 500))
        assert len(found.rows) == 1
    (row,) = rows_of(out / "sft.jsonl")
    assert row["prompt"] == ask and row["completion"] == [{"role": "assistant", "content": "four"}]


@pytest.mark.parametrize(
    ("row", "reward", "kind", "message"),
    [
        ({"prompt": "a", "text": "ab"}, "exact_answer", DataError, r"said\.jsonl:1: .*sample: is null"),
        (said("a", "b") | {"text": "b"}, "exact_answer", DataError, r"said\.jsonl:1: .*text: does not begin with"),
        (said("a", "b"), "exact_answer", DataError, r"said\.jsonl:1: has no answer, which reward"),
        (said("a", "b"), "[3]", ConfigError, r"--reward: must be a name"),
        (said("a", "b"), "exact", ConfigError, r"--reward\.name: no reward 'exact'"),
        (said("a", "b"), "doctest", ConfigError, r"--reward: .*allow_code_execution: is false"),
    ],
)
def test_what_cant_be_judged_is_told_and_nothing_is_written(
    tmp_path: Path, row: Any, reward: str, kind: type[UserError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make(tmp_path, [row], reward)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["said.jsonl"]


def test_the_command_tells_what_became_of_the_answers_and_overwrites_nothing(tmp_path: Path) -> None:
    answers = write(tmp_path / "said.jsonl", ROWS)
    arguments = ["synthesise", str(answers), "--reward", "exact_answer", "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(program, arguments)
    assert found.exit_code == 0, found.output
    assert "8 answers to 4 prompts, 7 distinct, 3 right, 1 cut off" in found.output
    again = CliRunner().invoke(program, arguments)
    assert isinstance(again.exception, ConfigError) and "exists already" in str(again.exception)
