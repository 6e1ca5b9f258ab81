"""`moelab data` with `select`: documents whose tags say most and cover most, and an account of those passed over."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from moelab.data.covering import complex_and_diverse
from moelab.data.identity import text_identity
from moelab_tools.cli import run as moelab

ASKS = (
    "Write a poem about {n}.",
    "What is {n} times seven?",
    "Implement a sort of {n} items.",
    "The number {n} is odd.",
)
TAIL = ("", "\n\n#### {n}", "\n\n    >>> {n} + 1\n    {m}")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    texts = [(ASKS[n % 4] + TAIL[n % 3]).format(n=n, m=n + 1) for n in range(96)]
    rows = [{"text": text, "kind": "odd" if n % 2 else "even"} for n, text in enumerate(texts)]
    (folder / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "turned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    chats = [{"chat": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]} for text in texts]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return folder


def run(library: Path, output: Path, name: str = "plain", source: str = ", domain_key: kind", **more: Any) -> int:
    given = {"sources": f"[{{name: jsonl, paths: [{library / name}.jsonl]{source}}}]", "output": output,
             "tags": "[{name: instruction}, {name: verifiable}]", "deduplicate.near": "null",
             "workers": 1, "piece_mb": 0.001} | more  # fmt: skip
    return moelab(["data", *(f"{key}={value}" for key, value in given.items())])


def kept(output: Path) -> list[dict[str, Any]]:
    files = sorted((output / "kept").iterdir())
    return [json.loads(line) for file in files for line in gzip.open(file, "rt", encoding="utf-8")]


def told(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "account.json").read_text())
    return found


def test_what_is_kept_is_what_the_rule_chooses_by_the_tags_in_the_rows(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(library, tmp_path / "all") == 0
    rows = kept(tmp_path / "all")
    tags = [{f"{key}={row[key]}" for key in ("instruction", "verifiable") if row[key] != "no"} for row in rows]
    expected = complex_and_diverse(tags, 20, [text_identity(row["text"]) for row in rows])
    capsys.readouterr()
    assert run(library, tmp_path / "some", **{"select.documents": 20}, keep_rejected="true") == 0
    assert f"selected: {expected}" in capsys.readouterr().out
    assert [row["text"] for row in kept(tmp_path / "some")] == [rows[n]["text"] for n in sorted(expected.chosen)]
    account = told(tmp_path / "some")["account"]
    assert sum(account["kept"].values()) == 20 == 96 - sum(count for *_, count in account["rejected"])
    bare = sum(not own for own in tags)
    left = {reason: sum(n for _, why, _, n in account["rejected"] if why == reason)
            for reason in ("others were taken", "without a tag that counts")}  # fmt: skip
    assert left == {"others were taken": 96 - bare - 20, "without a tag that counts": bare}
    assert sum(count for tag, *_, count, _ in account["tagged"] if tag == "verifiable") == 20
    assert told(tmp_path / "some")["selected"]["tags"] == expected.tags
    assert "Selected by tags" in (tmp_path / "some/account.html").read_text()


def test_neither_the_order_of_reading_nor_a_report_changes_the_choice(library: Path, tmp_path: Path) -> None:
    some = {"select": "{documents: 15, by: [domain, verifiable]}"}
    assert run(library, tmp_path / "once", **some, **{"tokens.tokenizer": "bytes"}) == 0
    assert run(library, tmp_path / "turned", "turned", **some) == 0
    texts = [sorted(row["text"] for row in kept(tmp_path / name)) for name in ("once", "turned")]
    assert texts[0] == texts[1] and len(texts[0]) == 15
    cache = json.loads((tmp_path / "once/tokens/cache.json").read_text())
    assert sum(one["documents"] for one in cache["manifest"].values()) == 15
    assert run(library, tmp_path / "seen", **some, report_only="true") == 0
    assert told(tmp_path / "seen")["selected"] == told(tmp_path / "once")["selected"]


def test_conversations_are_selected_as_documents_are(library: Path, tmp_path: Path) -> None:
    some = {"select.documents": 12, "source": ", messages_key: chat"}
    assert run(library, tmp_path / "out", "chats", **some) == 0
    rows = kept(tmp_path / "out")
    assert len(rows) == 12 and all(row["messages"][1]["content"] == "Yes." for row in rows)
    assert {row["instruction"] for row in rows} == {"write", "question", "code"}, "every kind, and none without"


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ("{documents: 0}", "select.documents: 0; at least 1"),
        ("{documents: 3, by: [verifable]}", "select.by: no tag 'verifable', did you mean 'verifiable'?"),
        ("{documents: 3, by: []}", "select.documents: there is nothing to select by"),
    ],
)
def test_a_selection_that_can_not_be_is_refused(
    select: str, said: str, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(library, tmp_path / "out", select=select) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_documents_without_any_tag_are_no_selection(library: Path, tmp_path: Path, capsys: Any) -> None:
    short = {"tags": "[{name: language, letters: 99999}]", "select.documents": 3}
    assert run(library, tmp_path / "out", **short) == 2
    assert "select: none of 96 documents has a tag of language" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
