"""Tags of instructions: what a reply may look like, which spellings are one tag, what is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
from moelab.errors import ConfigError, DataError, UserError
from moelab_tools.cli import moelab as program
from moelab_tools.synthesis.declaration import TagConfig
from moelab_tools.synthesis.steps import tag
from moelab_tools.synthesis.tags import normalised, plain

SCRIPTED = ["plugins=[scripted_generator]", "generator.name=scripted", "entry_points=false", "generator.script=mine"]


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    scripted_generator.BATCHES.clear()
    scripted_generator.SCRIPTS.clear()


def chat(*texts: str) -> dict[str, Any]:
    return {
        "messages": [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    }


def instruction_of(question: Question) -> str:
    return str(question.messages[0]["content"]).split("[begin]\n")[1].split("\n[end]")[0]


def make(folder: Path, rows: list[Any], *more: str, tags: dict[str, Any] | None = None) -> Path:
    def reply(question: Question) -> Reply:
        said = (tags or {}).get(instruction_of(question), [])
        return Reply(said if isinstance(said, str) else json.dumps([{"tag": one, "explanation": "x"} for one in said]))

    scripted_generator.SCRIPTS["mine"] = reply
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"data=[{folder / 'chats.jsonl'}]", f"output={folder / 'out'}", *SCRIPTED, *more]
    return tag(load_config(arguments, TagConfig))[1]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_come_back_with_tags_in_one_spelling_and_where_they_are_from(tmp_path: Path) -> None:
    rows = [
        chat("sort a list", "done"),
        chat("sort a tree", "done"),
        {"prompt": "write a poem", "completion": "no", "source": {"step": "mine"}},
    ]
    said = {
        "sort a list": ["Sorting Algorithm", "Python"],
        "sort a tree": ["sorting-algorithms", "data structure"],
        "write a poem": ["python", "Sorting algorithm"],
    }
    out = make(tmp_path, rows, "least=2", tags=said)
    found = rows_of(out / "tagged.jsonl")
    assert [row["tags"] for row in found] == [
        ["sorting algorithm", "python"], ["sorting algorithm"], ["python", "sorting algorithm"]
    ]  # fmt: skip
    assert [{k: v for k, v in row.items() if k not in ("tags", "source")} for row in found[:2]] == rows[:2]
    source = found[2]["source"]
    assert (source["step"], source["said"], source["of"]) == ("tags", said["write a poem"], {"step": "mine"})
    assert source["from"] == f"{tmp_path}/chats.jsonl:3" and source["generator"]["name"] == "scripted"
    assert json.loads((out / "tags.json").read_text()) == {"sorting algorithm": 3, "python": 2}
    account = json.loads((out / "synthesis.json").read_text())
    assert {"lines": 3, "raw": 6, "tags": 2, "rare": 1, "untagged": 0}.items() <= account.items()
    assert len(read_examples(out / "tagged.jsonl", Shaping("sft", ChatTemplate.chatml(ByteTokenizer()), 500)).rows) == 3


@pytest.mark.parametrize(
    ("reply", "tags", "unreadable"),
    [
        ('[{"tag": "Maths", "explanation": "sums"}]', ["maths"], 0),
        ('```json\n[{"tag": "Maths", "explanation": "a [b]"}, {"tag": "Logic"}]\n```\nDone.', ["maths", "logic"], 0),
        ('{"tag": "Maths"}', ["maths"], 0),
        ('[{"tag": "Maths"}, {"tag": 3}, "Logic", {"name": "x"}]', ["maths"], 0),
        ('[{"tag": "Maths"}, {"tag": "MATHS"}, {"tag": "?!"}]', ["maths"], 0),
        ("Maths, mostly.", [], 1),
        ('[{"tag": "Maths"', [], 1),
        ("[]", [], 1),
        ("[" * 5000 + "]" * 5000, [], 1),
        (f'[{{"tag": "{"word " * 40}"}}]', [], 0),
    ],
)
def test_tags_are_found_in_what_models_write_around_them(
    tmp_path: Path, reply: str, tags: list[str], unreadable: int
) -> None:
    out = make(tmp_path, [chat("count", "1")], "least=1", tags={"count": reply})
    (row,) = rows_of(out / "tagged.jsonl")
    assert row["tags"] == tags
    account = json.loads((out / "synthesis.json").read_text())
    assert (account["untagged"], account["unreadable"]) == (not tags, unreadable)


def test_the_commonest_spelling_stands_for_plurals_and_marks_and_letters_of_all_scripts_stay() -> None:
    said = [
        ["data queries"],
        ["Data Query"],
        ["data-query"],
        ["C++"],
        ["c"],
        ["class"],
        ["数学・計算"],
        ["Crème brûlée"],
    ]
    shown, raw, rare, none = normalised(said, 1)
    assert shown[:3] == [["data query"]] * 3
    assert shown[3] == shown[4] == ["c"], "as the paper's rule has it: special characters are spaces"
    assert shown[5:] == [["class"], ["数学 計算"], ["crème brûlée"]]
    assert (raw, rare, none) == (8, 0, 0)
    assert plain("हिन्दी  Text") == "हिन्दी text"


def test_a_tag_counts_once_a_conversation_and_rare_ones_are_left_out() -> None:
    said = [["Maths", "maths", "maths!"], ["logic"], ["logic"], [""]]
    assert normalised(said, 2) == ([[], ["logic"], ["logic"], []], 5, 1, 1)


def test_all_that_a_user_said_is_tagged_and_what_is_too_long_is_cut_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, [chat("one", "answer", "two", "answer"), chat("x" * 30, "a")], "longest=9", "least=1")
    asked = [instruction_of(one) for one in scripted_generator.BATCHES[0]]
    assert asked == ["one\n\ntwo", "x" * 9]
    assert "1 of 2 conversations: the first 9 characters" in caplog.text


def test_neither_batches_nor_company_change_what_a_line_is_asked_with(tmp_path: Path) -> None:
    rows = [chat(f"question {number}", "a") for number in range(5)]
    seeds = []
    for number, (size, some) in enumerate([(1, rows), (4, rows[::-1])]):
        scripted_generator.BATCHES.clear()
        (tmp_path / str(number)).mkdir()
        make(tmp_path / str(number), some, f"batch_size={size}")
        seeds.append({instruction_of(one): one.seed for batch in scripted_generator.BATCHES for one in batch})
    assert seeds[0] == seeds[1] and len(set(seeds[0].values())) == 5


@pytest.mark.parametrize(
    ("row", "more", "kind", "message"),
    [
        ({"text": "a"}, [], DataError, r"chats\.jsonl:1: .*must be a text or a list of messages, not null"),
        ({"messages": [{"role": "user"}]}, [], DataError, r"chats\.jsonl:1: holds a turn that is no"),
        ({"messages": [{"role": "system", "content": "a"}]}, [], DataError, r"chats\.jsonl:1: holds no word of a user"),
        ({"prompt": "a", "tags": []}, [], DataError, r"chats\.jsonl:1: has tags already"),
        ({"prompt": "a"}, ["least=0"], ConfigError, "least: must be at least 1"),
        ({"prompt": "a"}, ["request=Tag it."], ConfigError, r"request: must hold \{instruction\} once"),
    ],
)
def test_what_cant_be_tagged_is_told_and_nothing_is_written(
    tmp_path: Path, row: Any, more: list[str], kind: type[UserError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make(tmp_path, [row], *more)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl"]


def test_the_command_tells_what_became_of_the_lines(tmp_path: Path) -> None:
    scripted_generator.SCRIPTS["mine"] = lambda question: Reply('[{"tag": "Maths"}]')
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat("a", "b")) + "\n")
    data = f"data=[{tmp_path / 'chats.jsonl'}]"
    found = CliRunner().invoke(program, ["tag", data, f"output={tmp_path / 'out'}", *SCRIPTED])
    assert found.exit_code == 0, found.output
    assert "1 conversations, 0 with a reply that holds no tags, 1 without a tag in the end" in found.output
    assert "0 tags of 1 as they were said; 1 too rare, 0 no tags" in found.output
