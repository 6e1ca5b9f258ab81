"""Files of prompts: what comes of a good one, and of bad ones the file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moelab.errors import DataError
from moelab_tools.prompts_file import read_prompts


def test_json_lines_hold_prompts_or_messages_and_more(tmp_path: Path):
    messages = [{"role": "user", "content": "hi"}]
    lines = [{"prompt": "a", "answer": 3}, {"messages": messages}, {"prompt": messages}]
    (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    found = read_prompts(tmp_path / "p.jsonl")
    assert [one.text for one in found] == ["a", None, None]
    assert [one.messages for one in found] == [None, messages, messages]
    assert found[0].beside == {"answer": 3}
    assert found[1].where.endswith("p.jsonl:3")


def test_a_text_file_has_a_prompt_on_each_line(tmp_path: Path):
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\n\n two \n".encode())
    assert [one.text for one in read_prompts(tmp_path / "p.txt")] == ["one", " two "]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": 3}', r'p\.jsonl:2: "prompt" must be a text .* not a number'),
        ('{"prompt": "a"}\n{nope', r"p\.jsonl:2: is not JSON"),
        ('{"prompt": ""}', r"p\.jsonl:1: .* not an empty text"),
        ('{"text": "a"}', r'p\.jsonl:1: must hold either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', r'p\.jsonl:1: must hold either "prompt" or "messages"'),
        ('{"messages": "a"}', r'p\.jsonl:1: "messages" must be a list, not a text'),
        ('{"prompt": "a", "text": "b"}', r"p\.jsonl:1: has text of its own"),
        ("[1]", r"p\.jsonl:1: holds a list, not an object"),
        ("\n", r"p\.jsonl: holds no prompt"),
        ('{"prompt": "\\ud800"}', r"p\.jsonl:1: holds half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(content: str, message: str, tmp_path: Path):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / "p.jsonl")
