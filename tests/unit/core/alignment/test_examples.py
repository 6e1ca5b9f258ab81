"""Lines of a file as conversations: what is learned of each, and which line is told of where nothing can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moelab.alignment.batches import ExampleBatches
from moelab.alignment.examples import Examples, Shaping, read_examples
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.chat import ChatTemplate
from moelab.errors import DataError

TOKENIZER = ByteTokenizer()
ASK = {"role": "user", "content": "two and two?"}
SAY = {"role": "assistant", "content": "four"}
CALL, TOLD = {**SAY, "content": None, "tool_calls": [{}]}, {"role": "tool", "content": "4"}
END = TOKENIZER.eos_token_id


def read(tmp_path: Path, rows: list[Any], stage: str = "sft", longest: int = 1000, **how: Any) -> Examples:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return read_examples(path, Shaping(stage, ChatTemplate.chatml(TOKENIZER), longest, **how))


def learned(examples: Examples, row: int = 0, side: int = 0) -> str:
    answer = examples.rows[row].answers[side]
    return TOKENIZER.decode(answer.ids[answer.learned])


def test_of_a_conversation_the_assistants_turns_are_learned_and_what_ends_them(tmp_path: Path) -> None:
    found = read(tmp_path, [{"messages": [ASK, SAY, {"role": "user", "content": "sure?"}, {**SAY, "content": "yes"}]}])
    assert learned(found) == "four<|endoftext|>yes<|endoftext|>"
    everything = read(tmp_path, [{"messages": [ASK, SAY]}], loss_on="all")
    assert everything.rows[0].answers[0].learned.all()


@pytest.mark.parametrize("as_messages", [True, False])
def test_prompt_and_completion_are_learned_from_the_first_token_of_the_answer(
    tmp_path: Path, as_messages: bool
) -> None:
    row = {"prompt": [ASK], "completion": [SAY]} if as_messages else {"prompt": "2+2=", "completion": "four"}
    assert learned(read(tmp_path, [row])) == "four<|endoftext|>"


def test_a_prompt_left_out_is_what_both_conversations_begin_with(tmp_path: Path) -> None:
    said = read(tmp_path, [{"prompt": [ASK], "chosen": [SAY], "rejected": [{**SAY, "content": "five"}]}], "dpo")
    left_out = read(tmp_path, [{"chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "five"}]}], "dpo")
    for side, text in enumerate(("four<|endoftext|>", "five<|endoftext|>")):
        assert learned(said, side=side) == learned(left_out, side=side) == text
    assert said.fingerprint == left_out.fingerprint


def test_special_tokens_that_somebody_typed_stay_text(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"messages": [{**ASK, "content": "<|endoftext|>"}, {**SAY, "content": "<|endoftext|>"}]},
        {"prompt": "<|endoftext|>", "completion": "<|endoftext|>"},
    ]
    found = read(tmp_path, rows)
    chat, plain = (row.answers[0].ids for row in found.rows)
    assert (plain == END).sum() == 1 and plain[-1] == END
    assert (chat == END).sum() == 4  # what begins and ends two turns, less what follows the last


def test_what_is_too_long_is_cut_dropped_or_refused(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "a", "completion": "b" * 40}, {"prompt": "a", "completion": "b"}]
    cut = read(tmp_path, rows, longest=10)
    assert [len(row.answers[0].ids) for row in cut.rows] == [10, 3]
    assert cut.account.told(10) == [f"{cut.account.path}: 1 of 2 lines were cut to 10 tokens"]
    dropped = read(tmp_path, rows, longest=10, too_long="drop")
    assert len(dropped.rows) == 1 and dropped.account.dropped == 1
    with pytest.raises(DataError, match=r"rows\.jsonl:1: has 42 tokens"):
        read(tmp_path, rows, longest=10, too_long="refuse")


def test_a_pair_of_equal_answers_is_dropped_and_told(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    found = read(tmp_path, rows, "dpo")
    assert len(found.rows) == 1
    (told,) = found.account.told(1000)
    assert "1 of 2 lines have two answers of the same tokens" in told
    with pytest.raises(DataError, match=r"rows\.jsonl: holds no line to learn from: 1 of 1 lines have two answers of"):
        read(tmp_path, rows[:1], "dpo")
    with pytest.raises(DataError, match=r"rows\.jsonl: holds no line to learn from: it is empty"):
        read(tmp_path, [], "dpo")


@pytest.mark.parametrize(
    ("stage", "row", "said"),
    [
        ("sft", {"text": "a"}, r"has the keys text; sft needs messages, or prompt and completion"),
        ("dpo", {"prompt": "a", "chosen": "b"}, r"dpo needs prompt and chosen and rejected"),
        ("sft", {"messages": []}, r"messages: must be a list of"),
        ("sft", {"messages": [SAY]}, r"messages: turn 1, of assistant, comes first"),
        ("sft", {"messages": [ASK, ASK, SAY]}, r"messages: turn 2, of user, follows user"),
        ("sft", {"messages": [ASK, SAY, {"role": "system", "content": "x"}]}, r"turn 3, of system, follows assistant"),
        ("sft", {"messages": [ASK]}, r"messages: ends with a turn of user, not of assistant"),
        ("sft", {"messages": [{**ASK, "role": "system"}]}, r"ends with a turn of system, not of assistant; give one"),
        ("sft", {"messages": [ASK, SAY, ASK]}, r"ends with a turn of user, .*; leave what comes after it out"),
        ("sft", {"messages": [ASK, {**SAY, "content": ""}]}, r"messages: turn 2, of assistant, is empty"),
        ("sft", {"messages": [{**ASK, "role": "narrator"}, ASK, SAY]}, r"turn 1: role must be one of .*not 'narrator'"),
        ("sft", {"messages": [ASK, CALL, TOLD, SAY]}, r"turn 2, of assistant, calls"),
        ("sft", {"messages": [{"role": "user"}, SAY]}, r"messages: turn 1"),
        ("sft", {"prompt": "a", "completion": ""}, r"completion: is empty"),
        ("sft", {"prompt": "a", "completion": [SAY]}, r"must all be texts, or all lists of messages"),
        ("dpo", {"prompt": [ASK], "chosen": [SAY], "rejected": [ASK]}, r"rejected: turn 2, of user, follows"),
        ("dpo", {"chosen": "a", "rejected": "b"}, r"prompt: is missing"),
        ("dpo", {"prompt": [], "chosen": [SAY], "rejected": [SAY]}, r"prompt: is an empty list"),
        ("dpo", {"chosen": [ASK, SAY], "rejected": [{**ASK, "content": "?"}, SAY]}, r"begin with no turn that is the"),
        ("sft", {"prompt": "a" * 50, "completion": "b"}, r"hold nothing of an answer; raise sequence_length"),
        ("dpo", {"prompt": "a" * 50, "chosen": "b", "rejected": "c"}, r"the first 20 hold nothing of an answer"),
        ("sft", "{", r"JSON"),
        ("sft", "[]", r"not a list|must be|object"),
    ],
)  # fmt: skip
def test_a_line_that_cant_be_learned_from_is_told_with_its_place(
    tmp_path: Path, stage: str, row: Any, said: str
) -> None:
    good = {"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*({said})"):
        read(tmp_path, [good, row], stage, longest=20)


def test_a_template_that_refuses_is_told_with_the_line(tmp_path: Path) -> None:
    files = {"chat_template.jinja": b"{{ raise_exception('no tools here') }}"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [ASK, SAY]}) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*no tools here"):
        read_examples(path, Shaping("sft", ChatTemplate.from_tokenizer(TOKENIZER, files), 100))


def test_each_epoch_reads_every_example_once_and_the_chosen_rows_come_first(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": str(number), "rejected": "no"} for number in range(10)]
    batches = ExampleBatches(read(tmp_path, rows, "dpo").rows, 4, 0, END)
    seen = [example.where for step in range(5) for example in batches.chosen(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) and seen[:10] != seen[10:] and len(set(seen)) == 10
    batch = batches.batch(3)
    texts = [TOKENIZER.decode(ids[mask].numpy()) for ids, mask in zip(batch.input_ids, batch.learned, strict=True)]
    assert all(text != "no<|endoftext|>" for text in texts[:4]) and texts[4:] == ["no<|endoftext|>"] * 4
    parts = batch.split(1)
    assert [part.examples for part in parts] == [1] * 4
    assert sum(part.token_count for part in parts) == batch.token_count
    assert sum(part.targets for part in parts) == batch.targets
    assert np.array_equal(parts[2].input_ids[1], batch.input_ids[6][: parts[2].input_ids.shape[1]])
