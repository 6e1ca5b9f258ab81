"""Prompts made harder: what stays with where it is from, what is left out and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import scripted_generator
from moelab import Question, Reply
from moelab.alignment.examples import Shaping, read_examples
from moelab.config.load import load_config
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.chat import ChatTemplate
from moelab.errors import ConfigError
from moelab_tools.cli import moelab as program
from moelab_tools.synthesis.declaration import OPERATIONS, EvolveConfig
from moelab_tools.synthesis.steps import evolve

SCRIPTED = ["plugins=[scripted_generator]", "generator.name=scripted", "entry_points=false", "generator.script=mine"]


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    scripted_generator.BATCHES.clear()
    scripted_generator.SCRIPTS.clear()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def purpose_of(question: Question) -> str:
    last = question.messages[-1]["content"]
    return "gain" if "Are these two prompts equal" in last else "evolve" if "#Given Prompt#" in last else "answer"


def replies(**by_purpose: Callable[[str], str]) -> None:
    """Each a function of the last turn; others do well."""
    usual: dict[str, Callable[[str], str]] = {
        "evolve": lambda asked: asked.split("#Given Prompt#:\n")[1].split("\n\n#")[0] + " In verse.",
        "gain": lambda asked: "Not equal.",
        "answer": lambda asked: f"An answer to {asked}",
    }

    def reply(question: Question) -> Reply:
        purpose = purpose_of(question)
        text = (usual | by_purpose)[purpose](question.messages[-1]["content"])
        return Reply(text.removesuffix("<cut>"), not text.endswith("<cut>"))

    scripted_generator.SCRIPTS["mine"] = reply


def make(folder: Path, lines: list[Any], *more: str, output: str = "out") -> Path:
    rows = [one if isinstance(one, dict) else {"prompt": one} for one in lines]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"data=[{folder / 'asked.jsonl'}]", f"output={folder / output}", *SCRIPTED, *more]
    return evolve(load_config(arguments, EvolveConfig))[1]


def account_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "synthesis.json").read_text())
    return found


def test_rounds_build_on_each_other_and_each_line_names_its_parent(tmp_path: Path) -> None:
    replies()
    out = make(tmp_path, ["Sum up.", {"prompt": "Count.", "answer": 3, "source": {"step": "mine"}}], "rounds=2")
    prompts = rows_of(out / "prompts.jsonl")
    texts = [row["prompt"] for row in prompts]
    assert texts == [
        "Sum up. In verse.",
        "Count. In verse.",
        "Sum up. In verse. In verse.",
        "Count. In verse. In verse.",
    ]
    sources = [row["source"] for row in prompts]
    assert [source["round"] for source in sources] == [1, 1, 2, 2]
    assert sources[2]["parent"] == prompts[0]["id"] and sources[0]["parent"] not in {row["id"] for row in prompts}
    assert sources[1]["from"] == f"{tmp_path}/asked.jsonl:2" and sources[1]["of"] == {"step": "mine"}
    assert all(source["operation"] in OPERATIONS and source["seed"] == 0 for source in sources)
    assert "answer" not in prompts[1], "which was of the old prompt"
    learned = rows_of(out / "sft.jsonl")[0]
    assert learned["prompt"] == [{"role": "user", "content": "Sum up. In verse."}]
    assert learned["completion"] == [{"role": "assistant", "content": "An answer to Sum up. In verse."}]
    template = ChatTemplate.chatml(ByteTokenizer())
    assert len(read_examples(out / "sft.jsonl", Shaping("sft", template, 500)).rows) == 4


@pytest.mark.parametrize(
    ("reason", "by_purpose"),
    [
        ("empty", {"evolve": lambda asked: " \n"}),
        ("cut", {"evolve": lambda asked: "Sum up in<cut>"}),
        ("copied", {"evolve": lambda asked: "#Rewritten Prompt#: Sum up in verse."}),
        ("known", {"evolve": lambda asked: "sum up"}),
        ("no_gain", {"gain": lambda asked: "**Equal**, I think."}),
        ("sorry", {"answer": lambda asked: "I am sorry, I can't."}),
        ("hollow", {"answer": lambda asked: "... and the, of"}),
        ("hollow", {"answer": lambda asked: ""}),
    ],
)
def test_what_comes_to_nothing_is_left_out_counted_and_tried_again(
    tmp_path: Path, reason: str, by_purpose: dict[str, Callable[[str], str]]
) -> None:
    replies(**by_purpose)
    out = make(tmp_path, ["Sum up."], "rounds=2")
    account = account_of(out)
    assert rows_of(out / "prompts.jsonl") == [] and rows_of(out / "sft.jsonl") == []
    assert account["tried"] == 2 and account["evolved"] == 0
    again = "known" if reason not in ("empty", "cut", "copied") else reason  # the same text once more
    assert account["left_out"][reason] == (1 if again != reason else 2)
    assert sum(account["left_out"].values()) == 2


def test_the_same_prompt_made_of_two_is_kept_once(tmp_path: Path) -> None:
    replies(evolve=lambda asked: "Write a sonnet on rust.")
    account = account_of(make(tmp_path, ["Sum up.", "Count."]))
    assert (account["evolved"], account["left_out"]["known"]) == (1, 1)


def test_a_long_answer_may_be_sorry_half_an_answer_is_not_learned_and_an_unclear_word_is_counted(
    tmp_path: Path,
) -> None:
    long = "sorry " + "word " * 80
    replies(gain=lambda asked: "Perhaps.", answer=lambda asked: long if "Sum" in asked else "half<cut>")
    out = make(tmp_path, ["Sum up.", "Count."])
    account = account_of(out)
    assert (account["evolved"], account["unclear"], account["sft"]) == (2, 2, 1)
    assert [row["completion"][0]["content"] for row in rows_of(out / "sft.jsonl")] == [long.strip()]


def test_of_a_conversation_the_last_turn_is_evolved_and_no_more_is_asked_than_was_said(tmp_path: Path) -> None:
    replies()
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "Sum up."}]
    out = make(tmp_path, [{"messages": turns}], "check_gain=false", "answers=false", "operations=[constraints]")
    (row,) = rows_of(out / "prompts.jsonl")
    assert row["prompt"] == [turns[0], {"role": "user", "content": "Sum up. In verse."}]
    assert row["source"]["operation"] == "constraints"
    assert [purpose_of(batch[0]) for batch in scripted_generator.BATCHES] == ["evolve"]
    assert "one more constraint" in scripted_generator.BATCHES[0][0].messages[0]["content"]
    assert sorted(path.name for path in out.iterdir()) == ["prompts.jsonl", "synthesis.json"]


def test_neither_batches_nor_a_stop_change_a_byte_and_operations_are_all_drawn(tmp_path: Path) -> None:
    replies()
    prompts = [f"Say {number}." for number in range(30)]
    whole = make(tmp_path, prompts, "rounds=2", "batch_size=64", output="whole")
    assert {row["source"]["operation"] for row in rows_of(whole / "prompts.jsonl")} == set(OPERATIONS)
    usual, calls = scripted_generator.SCRIPTS["mine"], 0

    def stops(question: Question) -> Reply:
        nonlocal calls
        calls += 1
        if calls > 70:
            raise KeyboardInterrupt
        return usual(question)

    scripted_generator.SCRIPTS["mine"] = stops
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, prompts, "rounds=2", "batch_size=7")
    scripted_generator.SCRIPTS["mine"] = usual
    out = make(tmp_path, prompts, "rounds=2", "batch_size=7")
    for name in ("prompts.jsonl", "sft.jsonl", "synthesis.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["operations=[constraint]"], "operations: no 'constraint', did you mean 'constraints'"),
        (["operations=[]"], "operations: give some of"),
        (["operations=[breadth, breadth]"], "operations: give some of"),
        (["rounds=0"], "rounds: must be at least 1"),
    ],
)
def test_what_cant_be_is_told(tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, ["a"], *more)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked.jsonl"]


def test_the_command_tells_what_became_of_the_prompts(tmp_path: Path) -> None:
    replies(evolve=lambda asked: " ")
    (tmp_path / "asked.txt").write_text("one\ntwo\n")
    found = CliRunner().invoke(
        program, ["evolve", f"data=[{tmp_path / 'asked.txt'}]", f"output={tmp_path / 'out'}", *SCRIPTED]
    )
    assert found.exit_code == 0, found.output
    assert "of 2 evolutions 0 stay, left out: 2 empty" in found.output
