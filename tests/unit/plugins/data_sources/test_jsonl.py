"""JSON lines: keys, domains, gzip, and errors that name the line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from moelab import ConfigError, Corpus, DataContext, DataError, Places, Registry
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.chat import ChatTemplate
from moelab.hookspecs import DATA_SOURCES

LINES = [{"text": f"Text {n} é", "body": f"Body {n}", "from": "ab"[n % 2]} for n in range(6)]


def build(base: Path, **options: Any) -> Corpus:
    context = DataContext(ByteTokenizer(), validation_fraction=0.5, places=Places(search=(base,)))
    return Registry(entry_points=False).build(DATA_SOURCES, {"name": "jsonl", **options}, context, "data.source")


def write(path: Path, lines: list[Any]) -> None:
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def decoded(corpus: Corpus) -> str:
    streams = (corpus.train, corpus.validation)
    return "".join(ByteTokenizer().decode(stream.tokens) for stream in streams)


def test_each_line_is_a_document(tmp_path: Path) -> None:
    write(tmp_path / "some.jsonl", LINES)
    corpus = build(tmp_path, paths=["some.jsonl"])
    assert corpus.domains == ["some"]
    assert sorted(decoded(corpus).split("<|endoftext|>")[:-1]) == [line["text"] for line in LINES]
    assert "some.jsonl:3" in {*corpus.train.document_names, *corpus.validation.document_names}


def test_keys_choose_text_and_domain(tmp_path: Path) -> None:
    write(tmp_path / "some.jsonl", LINES)
    corpus = build(tmp_path, paths=["some.jsonl"], text_key="body", domain_key="from")
    assert corpus.domains == ["a", "b"]
    assert "Body 1" in decoded(corpus)


def test_gzip_and_folders_give_the_same_corpus(tmp_path: Path) -> None:
    write(tmp_path / "some.jsonl", LINES)
    (tmp_path / "zipped").mkdir()
    write(tmp_path / "zipped" / "some.jsonl.gz", LINES)
    plain, zipped = build(tmp_path, paths=["some.jsonl"]), build(tmp_path, paths=["zipped"])
    assert plain.fingerprint == zipped.fingerprint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut o', "is not JSON"),
        (b'{"content": "x"}', r"no string 'text' \(it has: content\); set data.source.text_key"),
        (b'{"text": 5}', "no string 'text'"),
        (b"[1]", "it has: a list"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"text": "a\\u0000b"}', "binary"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(line: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"some\.jsonl:2.*{message}"):
        build(tmp_path, paths=["some.jsonl"])


@pytest.mark.parametrize("cut", [slice(0, 40), slice(5, None)])
def test_a_truncated_or_false_archive_is_named(cut: slice, tmp_path: Path) -> None:
    write(tmp_path / "some.jsonl.gz", LINES)
    (tmp_path / "some.jsonl.gz").write_bytes((tmp_path / "some.jsonl.gz").read_bytes()[cut])
    with pytest.raises(DataError, match=r"some\.jsonl\.gz can't be read"):
        build(tmp_path, paths=["some.jsonl.gz"])


BAD = [
    b'{"text": "cut o',
    b'{"content": "x"}',
    b'{"text": "caf\xe9"}',
    b'{"text": "a\\u0000b"}',
    b"[1]",
    b'{"text": "a\0b"}',
]


def test_bad_lines_are_left_out_where_asked_and_each_is_counted(tmp_path: Path) -> None:
    good = [json.dumps(line).encode() for line in LINES]
    (tmp_path / "some.jsonl").write_bytes(b"\n".join([*good, *BAD]) + b"\n")
    corpus = build(tmp_path, paths=["some.jsonl"], skip_bad=True)
    assert sorted(decoded(corpus).split("<|endoftext|>")[:-1]) == [line["text"] for line in LINES]
    counted = {what.removeprefix("records left out, "): cause["count"] for what, cause in corpus.left_out.items()}
    assert counted == {"not JSON": 2, "without a text 'text'": 1, "not text in UTF-8": 2, "with a NUL": 1}
    assert "some.jsonl:7" in corpus.left_out["records left out, not JSON"]["example"]


def test_a_line_that_is_too_long_is_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelab_plugins.data_sources.jsonl.LARGEST_LINE", 100)
    lines = [LINES[0], {"text": "long " * 900}, *LINES[1:]]
    write(tmp_path / "some.jsonl", lines)
    with pytest.raises(DataError, match=r"some\.jsonl:2 has more than 0 MiB; cut it"):
        build(tmp_path, paths=["some.jsonl"])
    corpus = build(tmp_path, paths=["some.jsonl"], skip_bad=True)
    assert sorted(decoded(corpus).split("<|endoftext|>")[:-1]) == [line["text"] for line in LINES]
    assert "some.jsonl:7" in {*corpus.train.document_names, *corpus.validation.document_names}  # lines are counted on


def test_ids_name_documents_and_stand_once(tmp_path: Path) -> None:
    lines = [{**line, "id": f"doc-{n}"} for n, line in enumerate(LINES)]
    write(tmp_path / "some.jsonl", lines)
    corpus = build(tmp_path, paths=["some.jsonl"], id_key="id")
    assert {*corpus.train.document_names, *corpus.validation.document_names} == {f"doc-{n}" for n in range(6)}
    write(tmp_path / "some.jsonl", [*lines, {"text": "another text", "id": "doc-2"}])
    with pytest.raises(DataError, match=r"some\.jsonl:7 has the id 'doc-2', which a record before it has too"):
        build(tmp_path, paths=["some.jsonl"], id_key="id")
    left_out = build(tmp_path, paths=["some.jsonl"], id_key="id", skip_bad=True).left_out
    assert left_out["records left out, without an id, or with one that was there before"]["count"] == 1


def test_what_a_truncated_archive_holds_is_read_where_asked(tmp_path: Path) -> None:
    write(tmp_path / "some.jsonl.gz", [{"text": f"Text {n} of many {n * n}"} for n in range(5000)])
    whole = (tmp_path / "some.jsonl.gz").read_bytes()
    (tmp_path / "some.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"some\.jsonl\.gz can't be read after line \d+:"):
        build(tmp_path, paths=["some.jsonl.gz"])
    corpus = build(tmp_path, paths=["some.jsonl.gz"], skip_bad=True)
    assert len(corpus.train.document_names) > 500
    assert "records left out, the rest of files that can't be read to their end" in corpus.left_out


def test_no_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to read"):
        build(tmp_path)


def test_content_says_whether_a_file_is_zipped_and_links_have_their_own_names(tmp_path: Path) -> None:
    """As the Hugging Face hub's cache holds files: names are links to blobs named by a hash."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for name in ("english.jsonl.gz", "german.jsonl"):
        write(tmp_path / name, [{"text": f"{name} {n}"} for n in range(6)])
        blob = (tmp_path / name).rename(tmp_path / "blobs" / f"blob{len(name)}")
        (tmp_path / "snapshot" / name).symlink_to(blob)
    assert build(tmp_path, paths=["snapshot"]).domains == ["english", "german"]
    direct = build(tmp_path, paths=["blobs/blob16", "blobs/blob12"])
    assert direct.domains == ["blob12", "blob16"]
    assert "english.jsonl.gz 3" in decoded(direct)


def test_files_of_one_stem_give_names_of_their_own(tmp_path: Path) -> None:
    for number, name in enumerate(("a/x.jsonl", "b/x.jsonl", "b/x.jsonl.gz")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [{"text": f"{number} has {n}"} for n in range(6)])
    for paths in (["."], ["a", "b"], ["a/x.jsonl", "b/*"]):
        corpus = build(tmp_path, paths=paths)
        names = [*corpus.train.document_names, *corpus.validation.document_names]
        assert len(set(names)) == len(names) == 18
        assert corpus.domains == ["x"]


def test_other_files_of_a_folder_are_told(tmp_path: Path) -> None:
    write(tmp_path / "some.jsonl", LINES)
    for name in ("README.md", "some.jsonl.xz", "other.json"):
        (tmp_path / name).write_text("x")
    ((what, cause),) = build(tmp_path, paths=["."]).left_out.items()
    assert (what, cause["count"]) == ("files left out, not '**/*.jsonl' or '**/*.jsonl.gz' or '**/*.jsonl.zst'", 3)


TURNS = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "It is 2."}]


def test_conversations_are_rendered_by_the_chat_template_beside_plain_text(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": f"Say {n} <|endoftext|>"}, TURNS[1]] for n in range(8)]
    write(tmp_path / "some.jsonl", [*({"chat": chat, "kind": "chat"} for chat in chats),
                                    *({"text": f"plain {n}", "kind": "plain"} for n in range(8))])  # fmt: skip
    corpus = build(tmp_path, paths=["some.jsonl"], messages_key="chat", domain_key="kind", deduplicate=False)
    assert corpus.domains == ["chat", "plain"] and not corpus.left_out
    template, found = ChatTemplate.from_tokenizer(ByteTokenizer()), {}
    for stream in (corpus.train, corpus.validation):
        for n, name in enumerate(stream.document_names):
            begin, end = stream.document_starts[n : n + 2]
            found[name] = stream.tokens[begin:end].tolist()
            counts = stream.bytes_of(begin, end)
            assert counts is not None and counts.sum() == sum(token < 256 for token in found[name])
    for n, chat in enumerate(chats):  # what somebody typed is text, the template's own are control tokens
        assert found[f"some.jsonl:{n + 1}"] == [*template.render(chat).ids.tolist(), 256]
        assert found[f"some.jsonl:{n + 9}"] == [*f"plain {n}".encode(), 256]
    other = [
        {**line, "chat": [*chats[0][:1], {"role": "assistant", "content": "Other"}]} for line in [{"kind": "chat"}]
    ]
    write(tmp_path / "some.jsonl", [*({"chat": chat, "kind": "chat"} for chat in chats[1:]), *other,
                                    *({"text": f"plain {n}", "kind": "plain"} for n in range(8))])  # fmt: skip
    again = build(tmp_path, paths=["some.jsonl"], messages_key="chat", domain_key="kind", deduplicate=False)
    assert again.fingerprint != corpus.fingerprint


@pytest.mark.parametrize("chat", [[], [{"role": "user"}], "Hi", None])
def test_what_is_no_conversation_is_named(chat: Any, tmp_path: Path) -> None:
    write(tmp_path / "some.jsonl", [{"chat": TURNS}, {"chat": chat}])
    with pytest.raises(DataError, match=r"some\.jsonl:2, 'chat': messages: .*set data.source.messages_key"):
        build(tmp_path, paths=["some.jsonl"], messages_key="chat")
