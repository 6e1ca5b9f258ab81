"""`moelab data` with a tokenizer: the corpus that `build_corpus` makes, on disk, whatever was killed on the way."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from moelab import Corpus, DataContext, DataError, Document, Places, Registry, build_corpus
from moelab.data.chat import ChatTemplate
from moelab.data.tokenizer import load_tokenizer
from moelab.hookspecs import DATA_SOURCES
from moelab_tools.cli import run as moelab
from moelab_tools.curate import tokens as making
from moelab_tools.curate.run import CurateRequest, run_curate

WORDS = ("seven", "café", "of", "the", "times", "nobody", "else", "has", "said", "漢字")


def text_of(domain: str, n: int) -> str:
    chosen = np.random.default_rng([ord(domain[0]), n]).integers(0, 10**6, 40)
    return " ".join(f"{WORDS[number % 10]} {number}" for number in chosen.tolist())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    rows = [{"text": text_of(domain, n), "kind": domain, "id": f"{domain}/{n % 20}"} for domain in ("code", "prose")
            for n in range(30)]  # fmt: skip
    rows += [{"text": "<|endoftext|> spelled out", "kind": "code", "id": "special"}]
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vocab = {"[UNK]": 0, "</s>": 1} | {word: n + 2 for n, word in enumerate(WORDS)}
    words: Any = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    return folder


def command(library: Path, output: Path, tokenizer: str, **more: Any) -> list[str]:
    given = {"sources": f"[{{name: jsonl, paths: [{library / 'some.jsonl'}], domain_key: kind}}]", "output": output,
             "workers": 1, "piece_mb": 0.005, "tokens.tokenizer": tokenizer,
             "tokens.validation_fraction": 0.2} | more  # fmt: skip
    return [f"{key}={value}" for key, value in given.items()]


def opened(folder: Path, tokenizer: str | None = None, **options: Any) -> Corpus:
    own = load_tokenizer(tokenizer or str(folder))
    context = DataContext(own, validation_fraction=0.2, places=Places(search=(folder,)))
    part = {"name": "tokenised", "path": str(folder), **options}
    return Registry(entry_points=False).build(DATA_SOURCES, part, context, "data.source")


def kept(output: Path) -> list[Document]:
    texts = [gzip.decompress(file.read_bytes()).decode() for file in sorted((output / "kept").iterdir())]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    return [Document(row["text"], row["domain"], row["name"]) for row in lines]


def contents(folder: Path) -> dict[str, bytes]:
    names = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(("account", "tensorboard"))}


@pytest.fixture(scope="module")
def made(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "out"
    assert moelab(["data", *command(library, output, "bytes")]) == 0
    return output


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_it_is_the_corpus_that_the_same_documents_build(tokenizer: str, library: Path, tmp_path: Path) -> None:
    """Of words, ids don't say which bytes they stand for, so these lie beside them."""
    path = str(library) if tokenizer == "words" else tokenizer
    rows = [json.dumps({"text": text_of("z", n), "kind": "prose"}) for n in range(9)]
    (tmp_path / "some.jsonl").write_text("\n".join(rows))  # its documents have names of the library's
    sources = ", ".join(f"{{name: jsonl, paths: [{folder / 'some.jsonl'}], domain_key: kind}}"
                        for folder in (library, tmp_path))  # fmt: skip
    assert moelab(["data", *command(library, tmp_path / "out", path, sources=f"[{sources}]")]) == 0
    context = DataContext(load_tokenizer(path), validation_fraction=0.2)
    expected, found = build_corpus(kept(tmp_path / "out"), context), opened(tmp_path / "out/tokens")
    assert (found.fingerprint, found.domains) == (expected.fingerprint, expected.domains)
    assert found.manifest == expected.manifest
    for one, other in ((found.train, expected.train), (found.validation, expected.validation)):
        assert np.array_equal(one.tokens, other.tokens) and isinstance(one.tokens, np.memmap)
        assert np.array_equal(one.document_starts, other.document_starts)
        assert np.array_equal(one.document_domain, other.document_domain)
        assert list(one.document_names) == list(other.document_names)
        assert np.array_equal(one.identities, other.identities)
        assert np.array_equal(one.bytes_of(0, len(one)), other.bytes_of(0, len(other)))


@pytest.mark.parametrize("where", ["_make", "write_part", "write_about"])
def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bytes(
    where: str, made: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = getattr(making, where), list[Any]()

    def dies(*arguments: Any) -> None:
        if len(calls) == {"_make": 3, "write_part": 1, "write_about": 0}[where]:
            raise KeyboardInterrupt
        whole(*arguments)
        calls.append(arguments[2])

    request = CurateRequest(tuple(command(library, tmp_path / "out", "bytes")))
    with monkeypatch.context() as broken:
        broken.setattr(making, where, dies)
        with pytest.raises(KeyboardInterrupt):
            run_curate(request)
    assert not (tmp_path / "out").exists()
    again: list[int] = []
    make = making._make
    monkeypatch.setattr(making, "_make", lambda *a: (again.append(a[2]), make(*a)))
    run_curate(request)
    assert bool(again) == (where == "_make") and not set(again) & set(calls)
    assert contents(tmp_path / "out") == contents(made)


def test_processes_change_nothing_and_another_tokenizer_is_not_resumed(
    made: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(making, "write_part", dies)
        with pytest.raises(KeyboardInterrupt):
            run_curate(CurateRequest(tuple(command(library, tmp_path / "out", str(library)))))
    assert moelab(["data", *command(library, tmp_path / "out", "bytes", workers=2, entry_points="false")]) == 0
    assert contents(tmp_path / "out") == contents(made)


def test_what_it_makes_is_trained_on_by_domain(made: Path, tmp_path: Path) -> None:
    source = f"data.source={{name: tokenised, path: {made / 'tokens'}}}"
    small = ["train.steps=2", "train.sequence_length=32", "train.batch_size=4", "evaluation.sequences=4",
             "evaluation.prompts=[]", "observers=[]", "data.mixer={name: weights, weights: {code: 3, prose: 1}}",
             f"data.tokenizer={made / 'tokens'}", "data.validation_fraction=0.2"]  # fmt: skip
    assert moelab(["train", "train/tiny_moe", source, *small, f"run_dir={tmp_path / 'run'}"]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["data"]["mixture"]["code"]["read"] == 0.75
    assert summary["data"]["fingerprint"] == json.loads((made / "tokens/cache.json").read_text())["fingerprint"]


def test_tags_stand_in_rows_account_and_cache_and_can_be_the_domain(library: Path, tmp_path: Path) -> None:
    tags = "[{name: language}, {name: size, borders: [30, 500]}]"
    assert moelab(["data", *command(library, tmp_path / "out", "bytes", tags=tags)]) == 0
    texts = [gzip.decompress(file.read_bytes()).decode() for file in sorted((tmp_path / "out/kept").iterdir())]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    assert {row["size"] == ("0-29" if len(row["text"]) < 30 else "30-499" if len(row["text"]) < 500 else "500+")
            for row in rows} == {True}  # fmt: skip
    account = json.loads((tmp_path / "out/account.json").read_text())["account"]
    counted = {(tag, value, domain): count for tag, value, domain, count, _ in account["tagged"]}
    for (tag, value, domain), count in counted.items():
        assert count == sum(row[tag] == value and row["domain"] == domain for row in rows)
    corpus = opened(tmp_path / "out/tokens", domain_by=["domain", "size"])
    by_name = {row["name"]: row for row in rows}
    for stream in (corpus.train, corpus.validation):
        for name, number in zip(stream.document_names, stream.document_domain, strict=True):
            row = by_name[name]
            assert corpus.domains[number] == f"{row['domain']}/{row['size']}"
    assert sum(told["documents"] for told in corpus.manifest.values()) == len(rows)
    plain = opened(tmp_path / "out/tokens")
    assert plain.domains == ["code", "prose"] and plain.fingerprint != corpus.fingerprint
    with pytest.raises(DataError, match="has no tag 'colour'; it has: domain, language, size"):
        opened(tmp_path / "out/tokens", domain_by=["colour"])


def test_what_filters_would_keep_is_one_side_of_a_corpus_that_holds_both(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The filtered text by a mixer's and an evaluation's patterns is what the same filter keeps as a stage."""
    strict = "{name: length, min_characters: 420}"
    both, alone = tmp_path / "both", tmp_path / "alone"
    assert moelab(["data", *command(library, both, "bytes", tags=f"[{{name: passes, filters: [{strict}]}}]")]) == 0
    assert moelab(["data", *command(library, alone, "bytes", stages=f"[{strict}]")]) == 0
    corpus, filtered = opened(both / "tokens", domain_by=["passes"]), opened(alone / "tokens")
    assert set(corpus.domains) == {"yes", "no"}
    for whole, part in ((corpus.train, filtered.train), (corpus.validation, filtered.validation)):
        pairs = zip(whole.document_names, whole.document_domain, strict=True)
        assert sorted(name for name, one in pairs if corpus.domains[one] == "yes") == sorted(part.document_names)
    source = f"{{name: tokenised, path: {both / 'tokens'}, domain_by: [domain, passes]}}"
    words = ["train/tiny_moe", f"data.source={source}", f"data.tokenizer={both / 'tokens'}", "train.steps=4",
             "data.validation_fraction=0.2", "train.sequence_length=32", "train.batch_size=4", "train.log_every=2",
             "evaluation.sequences=8", "evaluation.prompts=[]", "observers=[]",
             "data.mixer={name: temperature, domains: ['*/yes']}", f"run_dir={tmp_path / 'run'}"]  # fmt: skip
    assert moelab(["train", *words, "evaluation.domains=['*/yes']"]) == 0
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    read = {tag: row[tag] for row in logged for tag in row if tag.startswith("data/read/")}
    assert sum(read[f"data/read/{domain}/yes"] for domain in ("code", "prose")) == 1
    scored = {tag for row in logged for tag in row if tag.startswith("eval_domain/bits_per_byte/")}
    assert {tag.rpartition("/")[2] for tag in scored} == {"yes"}
    capsys.readouterr()
    assert moelab(["train", *words, "evaluation.domains=['*/yea']", "--force"]) == 2
    assert "evaluation.domains: no domain '*/yea'" in capsys.readouterr().err.replace("\n", " ")
    assert (tmp_path / "run/summary.json").is_file()


def test_conversations_pass_filters_as_they_are_and_are_rendered_in_the_cache(library: Path, tmp_path: Path) -> None:
    lines = (library / "some.jsonl").read_text().splitlines()
    chats = [[{"role": "user", "content": text_of("x", n) + "  "}, {"role": "assistant", "content": "Yes."}]
             for n in range(20)]  # fmt: skip
    rows = [json.dumps({"chat": chat, "kind": "chat"}) for chat in [*chats, chats[0]]]
    (tmp_path / "some.jsonl").write_text("\n".join([*lines, *rows]))
    source = f"[{{name: jsonl, paths: [{tmp_path / 'some.jsonl'}], domain_key: kind, messages_key: chat}}]"
    given = {"sources": source, "stages": "[{name: normalise}]", "tags": "[{name: size}]"}
    assert moelab(["data", *command(tmp_path, tmp_path / "out", "bytes", **given)]) == 0
    corpus = opened(tmp_path / "out/tokens")
    template = ChatTemplate.from_tokenizer(load_tokenizer("bytes"))
    expected = sorted([*template.render(chat).ids.tolist(), 256] for chat in chats)
    found = [
        stream.tokens[stream.document_starts[n] : stream.document_starts[n + 1]].tolist()
        for stream in (corpus.train, corpus.validation)
        for n in np.flatnonzero(stream.document_domain == corpus.domains.index("chat"))
    ]
    assert sorted(found) == expected  # the copy is gone
    kept_file = [str(path) for path in (tmp_path / "out/kept").iterdir()]
    again = Registry(entry_points=False).build(
        DATA_SOURCES,
        {"name": "jsonl", "paths": kept_file, "domain_key": "domain", "messages_key": "messages"},
        DataContext(load_tokenizer("bytes"), validation_fraction=0.2), "data.source",
    )  # fmt: skip
    assert again.fingerprint == corpus.fingerprint


def test_copies_take_their_tags_with_them(library: Path, tmp_path: Path) -> None:
    lines = (library / "some.jsonl").read_text().splitlines()
    (tmp_path / "some.jsonl").write_text("\n".join([*lines, *lines[:7]]))
    assert moelab(["data", *command(tmp_path, tmp_path / "out", "bytes", tags="[{name: size}]")]) == 0
    account = json.loads((tmp_path / "out/account.json").read_text())["account"]
    assert sum(count for *_, count, _ in account["tagged"]) == sum(account["kept"].values()) == 61


@pytest.mark.parametrize("tags", ["[{name: size}, {name: size}]", "[{name: sise}]"])
def test_a_tag_that_can_not_be_is_refused(tags: str, library: Path, tmp_path: Path, capsys: Any) -> None:
    assert moelab(["data", *command(library, tmp_path / "out", "bytes", tags=tags)]) == 2
    assert "tags." in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("least", ["null", "1.0"])
def test_held_out_text_has_no_near_copy_in_training_though_copies_may_stay(
    least: str, library: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (library / "some.jsonl").read_text().splitlines()][:60]
    near = [{**row, "text": re.sub("nobody|said", "somebody", row["text"], count=1)} for row in rows]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *near]))
    given = {"deduplicate": f"{{exact: false, near: {least}}}", "keep_rejected": "true"}
    assert moelab(["data", *command(tmp_path, tmp_path / "out", "bytes", **given)]) == 0
    corpus, account = (
        opened(tmp_path / "out/tokens"),
        json.loads((tmp_path / "out/account.json").read_text())["account"],
    )

    def lines(stream: Any) -> set[int]:
        return {int(re.sub(r"\D", "", name.rpartition(":")[2].partition("~")[0])) for name in stream.document_names}

    held_out, train = lines(corpus.validation), lines(corpus.train)
    assert not {number % 60 for number in held_out} & {number % 60 for number in train}
    leaked = sum(count for stage, reason, _, count in account["rejected"] if (stage, reason) == (
        "split", "near copies of held-out text"))  # fmt: skip
    assert leaked > 5 and len(held_out) + len(train) + leaked == 120 == sum(account["documents"].values())


@pytest.mark.parametrize("name", ["train.tokens.npy", "validation.names.npy", "cache.json", "manifest.json"])
def test_a_changed_byte_is_named(name: str, made: Path, tmp_path: Path) -> None:
    for path in (made / "tokens").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        opened(tmp_path, str(made / "tokens"))
    (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        opened(tmp_path, str(made / "tokens"), verify=False)


def test_another_tokenizer_or_split_or_folder_is_told(
    made: Path, library: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match=r"was made with another tokenizer than data.tokenizer names; write data.tok"):
        opened(made / "tokens", str(library))
    with pytest.raises(DataError, match="is no tokenised cache"):
        opened(tmp_path, "bytes")
    context = DataContext(load_tokenizer("bytes"), split_seed=3)
    part = {"name": "tokenised", "path": str(made / "tokens")}
    Registry(entry_points=False).build(DATA_SOURCES, part, context, "data.source")
    assert "is split already, with validation_fraction 0.2 and split_seed 0" in caplog.text


def test_too_little_text_for_both_sides_is_refused_and_nothing_is_made(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.jsonl").write_text(json.dumps({"text": "alone", "kind": "a"}))
    assert moelab(["data", *command(tmp_path, tmp_path / "out", "bytes")]) == 2
    assert "tokens: nothing to hold out: 1 documents are left" in capsys.readouterr().err.replace("\n", " ")
    assert moelab(["data", *command(library, tmp_path / "out", "nowhere.json")]) == 2
    assert not (tmp_path / "out").exists()
