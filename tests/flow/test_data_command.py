"""`moelab data`: every document accounted for, the same bytes after a kill and with any number of processes."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from moelab_tools.cli import run as moelab
from moelab_tools.curate import filtering
from moelab_tools.curate.run import CurateRequest, run_curate

SENTENCE = "Document {n} of {domain} says that {n} times seven is {m}, which nobody else has said in these words. "


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    for domain in ("code", "prose"):
        (folder / domain).mkdir()
        for n in range(30):
            lines = [SENTENCE.format(n=f"{n}-{k}", domain=domain, m=7 * n + k) for k in range(6)]
            (folder / domain / f"{n:02d}.txt").write_text("\n".join(lines))
    (folder / "prose/30.txt").write_text((folder / "prose/03.txt").read_text().upper())  # a copy but for its case
    near = (folder / "prose/04.txt").read_text().split()
    near[40] = "otherwise"
    (folder / "prose/31.txt").write_text(" ".join(near))
    (folder / "prose/32.txt").write_text("short")
    (folder / "code/30.txt").write_text("short")
    (folder / "code/32.txt").write_text(" \n")
    (folder / "code/31.txt").write_text("spaces at the end   \r\n" + SENTENCE.format(n=1, domain="x", m=2) * 2)
    return folder


STAGES = ["{name: normalise}", "{name: length, min_characters: 20, domains: [prose]}"]


def words(library: Path, output: Path, **more: Any) -> list[str]:
    given = {"sources": f"[{{name: text, paths: [{library}]}}]", "stages": f"[{', '.join(STAGES)}]", "output": output,
             "workers": 1, "piece_mb": 0.004} | more  # fmt: skip
    return [f"{key}={value}" for key, value in given.items()]


def rows(folder: Path) -> list[dict[str, str]]:
    return [
        json.loads(line) for file in sorted(folder.glob("*.gz")) for line in gzip.open(file, "rt", encoding="utf-8")
    ]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "tensorboard"]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def made(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "out"
    assert moelab(["data", *words(library, output, keep_rejected="true")]) == 0
    return output


def test_kept_and_left_out_are_together_what_was_read(made: Path, library: Path) -> None:
    names = sorted(f"{row['domain']}/{row['name']}" for part in ("kept", "rejected") for row in rows(made / part))
    assert len(names) == len(set(names)) == len(list(library.rglob("*.txt"))) == 66
    account = json.loads((made / "account.json").read_text())["account"]
    assert sum(account["documents"].values()) == 66 and sum(account["kept"].values()) == len(rows(made / "kept")) == 62
    assert sum(count for *_, count in account["rejected"]) == 4


def test_each_reason_is_counted_where_it_belongs(made: Path) -> None:
    left_out = [row for row in rows(made / "rejected") if row["domain"] == "prose"]
    found = {Path(row["name"]).name: (row["stage"], row["reason"]) for row in left_out}
    assert [(row["stage"], row["reason"]) for row in rows(made / "rejected") if row not in left_out] == [
        ("0. reading", "empty")
    ]
    assert found == {
        "32.txt": ("2. length", "too few characters"),
        "30.txt": ("deduplicate: exact", "copies"),
        "31.txt": ("deduplicate: near", "near copies"),
    }
    texts = {(row["domain"], Path(row["name"]).name): row["text"] for row in rows(made / "kept")}
    assert texts["code", "30.txt"] == "short"  # the rule is for prose alone
    assert texts["code", "31.txt"].startswith("spaces at the end\n")
    changed = json.loads((made / "account.json").read_text())["account"]["changed"]
    assert ["1. normalise", "code", 1] in changed or any(row[:2] == ["1. normalise", "code"] for row in changed)


def test_tensorboard_has_the_table_and_examples(made: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(made / "tensorboard"))
    events.Reload()
    found = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert found.keys() == {"data/account", "data/left_out"}
    rows_of_table = [line.split(" | ") for line in found["data/account"].splitlines()]
    assert rows_of_table[0] == ["| documents", "all", "code", "prose |"]
    assert ["| 2. length: too few characters", "1", "0", "1 |"] in rows_of_table
    assert "short" in found["data/left_out"] and "near copies" in found["data/left_out"]


def test_what_a_source_leaves_out_stands_in_the_account(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text(json.dumps({"text": "good and long enough"}) + "\n{cut\n")
    source = f"[{{name: jsonl, paths: [{tmp_path / 'some.jsonl'}], skip_bad: true}}]"
    assert moelab(["data", *words(tmp_path, tmp_path / "out", sources=source)]) == 0
    told = json.loads((tmp_path / "out/account.json").read_text())["beside_documents"]
    assert told["records left out, not JSON"]["count"] == 1
    assert "records left out, not JSON: 1 (first" in (tmp_path / "out/account.html").read_text()


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    made: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, done = tmp_path / "out", []
    whole = filtering.make_piece

    def dies(*arguments: Any) -> None:
        if len(done) == 5:
            raise KeyboardInterrupt
        whole(*arguments)
        done.append(arguments[2])

    monkeypatch.setattr("moelab_tools.curate.run.make_piece", dies)
    request = CurateRequest(tuple(words(library, output, keep_rejected="true")))
    with pytest.raises(KeyboardInterrupt):
        run_curate(request)
    assert not output.exists() and len(done) == 5
    made_again: list[int] = []
    monkeypatch.setattr("moelab_tools.curate.run.make_piece", lambda *a: (made_again.append(a[2]), whole(*a)))
    run_curate(request)
    assert made_again and not set(made_again) & set(done)
    ours = {name: content for name, content in contents(output).items() if not name.startswith("account")}
    assert ours == {name: content for name, content in contents(made).items() if not name.startswith("account")}
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["out"]


def test_a_source_that_changed_is_read_anew(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "library"
    shutil.copytree(library, own)
    request = CurateRequest(tuple(words(own, tmp_path / "out")))

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("moelab_tools.curate.run.Pieces", dies)
        with pytest.raises(KeyboardInterrupt):
            run_curate(request)
    (own / "code/05.txt").write_text("Something else altogether, and only now.")
    run_curate(request)
    assert "Something else altogether, and only now." in {row["text"] for row in rows(tmp_path / "out/kept")}


def test_processes_change_nothing(made: Path, library: Path, tmp_path: Path) -> None:
    assert (
        moelab(["data", *words(library, tmp_path / "out", keep_rejected="true", workers=2, entry_points="false")]) == 0
    )
    for part in ("kept", "rejected"):
        assert contents(tmp_path / "out" / part) == contents(made / part)


def test_a_report_alone_writes_no_text(library: Path, tmp_path: Path) -> None:
    assert moelab(["data", *words(library, tmp_path / "out"), "--report-only"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["account.html", "account.json", "tensorboard"]


def test_a_report_asks_every_filter_of_every_document(library: Path, tmp_path: Path) -> None:
    """What a filter drops by itself is what it drops as the only one; the account of stages is that of a real run."""
    filters = [
        "{name: length, min_characters: 20}",
        "{name: length, min_words: 90}",
        "{name: characters, min_letters: 0.87}",
    ]
    stages = {"stages": f"[{{name: normalise}}, {', '.join(filters)}]"}

    def told(name: str, *options: str, **more: str) -> Any:
        given = words(library, tmp_path / name, **{"deduplicate": "{near: null}"} | more)
        assert moelab(["data", *given, *options]) == 0
        return json.loads((tmp_path / name / "account.json").read_text())

    seen, made = told("seen", "--report-only", **stages), told("made", **stages)
    assert {key: value for key, value in seen["account"].items() if key not in ("asked", "dropped_by")} == {
        key: value for key, value in made["account"].items() if key not in ("asked", "dropped_by")
    }
    assert "agreement" not in made and made["account"]["dropped_by"] == []
    for number, one in enumerate(filters, 2):
        alone = told(f"alone{number}", "--report-only", stages=f"[{{name: normalise}}, {one}]")
        dropped = sum(count for stage, *_, count in alone["account"]["rejected"] if stage.startswith("2. "))
        name = f"{number}. {one[7:].partition(',')[0]}"
        assert dropped == sum(count for _, names, count in seen["account"]["dropped_by"] if name in names) > 0
    pairs = {(one["first"], one["second"]) for one in seen["agreement"] if one["domain"] == "all"}
    assert pairs == {("2. length", "3. length"), ("2. length", "4. characters"), ("3. length", "4. characters")}
    assert "How far filters agree" in (tmp_path / "seen/account.html").read_text()


def test_what_it_makes_can_be_trained_on(made: Path, tmp_path: Path) -> None:
    source = f"data.source={{name: jsonl, paths: [{made / 'kept'}], domain_key: domain}}"
    small = ["train.steps=1", "train.sequence_length=32", "train.batch_size=2", "evaluation.sequences=2",
             "evaluation.prompts=[]", "observers=[]", f"run_dir={tmp_path / 'run'}"]  # fmt: skip
    assert moelab(["train", "train/tiny_moe", source, *small]) == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"stages": "[{name: lenght}]"}, "stages.0.name: no text filter 'lenght', did you mean 'length'?"),
        ({"stages": "[{name: length, domains: code}]"}, "stages.0.domains: 'code' is no list of domains"),
        ({"sources": "[]"}, "sources: nothing to read"),
        ({"sources": "[{name: text, paths: [nowhere]}]"}, "no file or folder 'nowhere'"),
        ({"deduplicate": "{near: 1.5}"}, "deduplicate.near: 1.5 is no share"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_made(
    changed: dict[str, str], said: str, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moelab(["data", *words(library, tmp_path / "out", **changed)]) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert all(path.name.endswith(".lock") for path in tmp_path.iterdir())


def test_a_domain_of_which_nothing_is_left_is_told(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for domains, count in (("[code]", 1), ("[code, prose]", 2)):
        stages = f"[{{name: length, min_characters: 100000, domains: {domains}}}]"
        assert moelab(["data", *words(library, tmp_path / f"out{count}", stages=stages)]) == 0
        told = json.loads((tmp_path / f"out{count}/account.json").read_text())["beside_documents"]
        assert told["domains of which nothing is left"]["count"] == count
        assert "nothing is left: " in caplog.text and "'code' of" in caplog.text
        assert ("train on it" in capsys.readouterr().out) == (count == 1)


def test_of_many_domains_the_largest_have_a_column_in_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"text {n} of {d}", "domain": f"a-domain-{d:02}"} for d in range(40) for n in range(1 + (d == 33))]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("COLUMNS", "80")
    source = f"[{{name: jsonl, paths: [{tmp_path / 'some.jsonl'}], domain_key: domain}}]"
    assert moelab(["data", *words(tmp_path, tmp_path / "out", sources=source, stages="[]")]) == 0
    told = capsys.readouterr().out
    head = next(line for line in told.splitlines() if "documents" in line).split()
    assert head == ["documents", "all", "a-domain-00", "a-domain-01", "a-domain-33"]
    assert "37 smaller domains stand in account.html" in told and "\N{HORIZONTAL ELLIPSIS}" not in told


def test_why_nothing_was_left_of_a_source_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "some.jsonl").write_text("{cut\n")
    source = f"[{{name: jsonl, paths: [{tmp_path / 'some.jsonl'}], skip_bad: true}}]"
    assert moelab(["data", *words(tmp_path, tmp_path / "out", sources=source)]) == 2
    assert "no document with any text" in capsys.readouterr().err and "not JSON: 1 (first" in caplog.text


def test_a_disk_that_is_full_when_copies_are_looked_for_is_one_line(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mapped file that was not given its place first ends the process by a signal there."""

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    assert moelab(["data", *words(library, tmp_path / "out")]) == 1
    assert "signatures.u32: no space left on the disk" in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "why"), [("notes.txt", "is a file"), ("notes.txt/out", "notes.txt: Not a directory")])
def test_an_output_that_can_be_no_folder_is_one_line_and_stays_as_it_is(
    name: str, why: str, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for more in ([], ["--force"]):
        assert moelab(["data", *words(library, tmp_path / name), *more]) == 2
        assert why in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("notes.txt", "mine")]


def test_an_output_that_is_there_is_not_replaced_unasked(
    made: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(made, output)
    assert moelab(["data", *words(library, output)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert contents(output) == contents(made)
    assert moelab(["data", *words(library, output), "--force"]) == 0
    assert not (output / "rejected").exists()


def test_what_no_text_file_can_hold_is_refused_or_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"text": f"half of a pair {chr(0xD800)} in line {n}, and words enough"}) for n in range(3)]
    (tmp_path / "half.jsonl").write_text("\n".join(lines))
    (tmp_path / "nul.jsonl").write_text(json.dumps({"text": "a\0b"}))
    given = {name: f"[{{name: jsonl, paths: [{tmp_path / name}.jsonl]}}]" for name in ("half", "nul")}
    assert moelab(["data", *words(tmp_path, tmp_path / "out", sources=given["half"])]) == 0
    assert "documents with half of a UTF-16 pair, read as '?': 3" in capsys.readouterr().err.replace("\n", " ")
    assert "half of a pair ? in line 0" in rows(tmp_path / "out/kept")[0]["text"]
    assert moelab(["data", *words(tmp_path, tmp_path / "none", sources=given["nul"])]) == 2
    assert "is binary, not text (it has a NUL)" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "none").exists()
