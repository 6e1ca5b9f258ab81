"""Names on the hub, from a cache laid out by hand: no network is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moelab
from moelab import Corpus, DataContext, DataError, Registry, session
from moelab.config.model import ModelConfig
from moelab.data.account import Account
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.tokenizer import load_tokenizer
from moelab.errors import CheckpointError
from moelab.hf.save import save_hf
from moelab.hookspecs import DATA_SOURCES
from moelab.hub import ALLOWED, REFUSED, commit_of, dataset_path, user_folder
from moelab.origin import origin_of, read_origin

hub = pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = ModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """models--ORG--NAME/refs/main says the commit, snapshots/COMMIT holds the files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache/models--my-org--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    folder: Path = repository / "snapshots" / COMMIT
    save_hf(moelab.build(MODEL, seed=3), folder, dtype=torch.float32)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("name", ["my-org/small", "hf://my-org/small", "my-org/small@main", f"my-org/small@{COMMIT}"])
def test_a_name_in_the_cache_is_the_folder_of_its_commit(cache: Path, name: str) -> None:
    assert user_folder(name).resolve() == cache.resolve()
    assert read_origin(name).model.hidden_size == 32
    found = origin_of({"train": {"init_from": name}})
    assert found is not None
    assert found.folder.name == COMMIT


def test_a_name_is_found_in_a_process_that_has_loaded_nothing_else_of_the_hub(cache: Path, tmp_path: Path) -> None:
    """As `moelab upcycle` is one; transformers has loaded more."""
    program = "from moelab.hub import user_folder; print(user_folder('my-org/small'))"
    world = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    outcome = subprocess.run([sys.executable, "-c", program], env=world, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert Path(outcome.stdout.strip()).resolve() == cache.resolve()


def test_what_begins_with_a_folder_that_is_there_is_a_path(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "my-org").mkdir()
    assert user_folder("my-org/small").resolve() == (tmp_path / "my-org/small").resolve()


def test_what_is_not_there_is_said_with_how_to_fetch_it(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="hf download my-org/absent --revision v2"):
        user_folder("my-org/absent@v2")


def test_a_mistyped_folder_is_told_where_it_was_looked_for_and_that_it_was_taken_for_a_name(
    cache: Path, tmp_path: Path
) -> None:
    """Whatever names weights by a path or a name: one place tells it."""
    wanted = (
        rf"runs/x: no such folder or file in {tmp_path}: .*\./runs/x is never .*; as a name on the Hugging Face "
        r"hub it is not.* in the cache, and HF_HUB_OFFLINE forbids .*: hf download runs/x$"
    )
    for ask in (user_folder, read_origin, moelab.load, load_tokenizer):
        with pytest.raises(moelab.UserError, match=wanted):
            ask("runs/x")
    with pytest.raises(CheckpointError, match=f"^train.init_from: {wanted}"):
        origin_of({"train": {"init_from": "runs/x"}})
    with pytest.raises(CheckpointError, match=rf"^runs/x: no such folder in {tmp_path}; give"):
        read_origin("./runs/x")
    with pytest.raises(CheckpointError, match=r"^hf://runs/x is not") as told:
        user_folder("hf://runs/x")
    assert "folder" not in str(told.value)


class Broken(Exception):
    """As httpx's are: no OSError."""


@pytest.mark.parametrize(
    ("error", "why"),
    [
        ("RepositoryNotFoundError", "is unknown, or private; for one of yours: hf auth login; hf download runs/x"),
        ("GatedRepoError", "has terms to be accepted on its page first; then: hf auth login; hf download runs/x"),
        ("RevisionNotFoundError", "has no such revision"),
        ("LocalEntryNotFoundError", r"is not, .*the hub can't be asked \(LocalEntryNotFoundError\); with a network"),
        ("HFValidationError", r"can't be had \(HFValidationError\)"),
        (Broken("the proxy refuses"), r"can't be had \(Broken\); with a network: hf download runs/x"),
    ],
)
def test_why_a_name_can_not_be_had_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str | Exception, why: str
) -> None:
    refusal = error if isinstance(error, Exception) else None
    if isinstance(error, str):
        kind: Any = getattr(import_module("huggingface_hub.errors"), error)
        refusal = kind.__new__(kind)  # whatever its constructor asks for in this version

    def refuse(*_: object, **__: object) -> str:
        assert refusal is not None
        raise refusal

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"^runs/x: no such folder .* it {why}"):
        user_folder("runs/x")


def test_without_the_package_a_mistyped_folder_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"^runs/x: no such folder or file in .*pip install 'moelab\[hub\]'"):
        user_folder("runs/x")


def test_nothing_that_runs_is_fetched() -> None:
    filtered = import_module("huggingface_hub.utils").filter_repo_objects(
        ["model.safetensors", "config.json", "modeling.py", "pytorch_model.bin", "original/x.json", "tokenizer.json",
         "tokenizer.py", "generation_config.json"],
        allow_patterns=list(ALLOWED), ignore_patterns=list(REFUSED),
    )  # fmt: skip
    assert list(filtered) == ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]


def test_the_commit_stands_in_the_summary_also_of_a_run_that_went_on(cache: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {n} of some words " * 4}) + "\n" for n in range(12)))
    words = [
        f"data.source={{name: jsonl, paths: [{text}]}}", "train.batch_size=2", "train.sequence_length=16",
        "evaluation.sequences=2", "evaluation.sample_tokens=0", "observers=[]", "train.init_from=my-org/small",
        "data.validation_fraction=0.3", "schedule.name=constant", "run_dir=run",
    ]  # fmt: skip
    for steps, more in ((1, []), (2, ["resume=true"])):
        session.train(moelab.load_config(*words, f"train.steps={steps}", *more), progress=False)
        assert json.loads(Path("run/summary.json").read_text())["init_commit"] == COMMIT
    assert commit_of(tmp_path) is None


def lines(first: int) -> bytes:
    return b"".join(
        b'{"text": "document %d of some words, and some more of them"}\n' % n for n in range(first, first + 8)
    )


DATA = {
    "train.jsonl": lines(0), "more/late.jsonl": lines(8), "notes.txt": b"one\n---\ntwo\n---\nthree\n---\nfour",
    "README.md": b"a card", ".gitattributes": b"", "table.parquet": b"\0\0",
    "ids.npy": b"",
}  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """datasets--ORG--NAME/snapshots/COMMIT holds links into blobs, as huggingface_hub lays it out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache/datasets--my-org--some-text"
    for reference in ("main", "refs/pr/3", "a/b"):
        path = repository / "refs" / reference
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(COMMIT)
    folder: Path = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir()
    for number, (name, content) in enumerate(DATA.items()):
        blob = repository / "blobs" / f"{number:040x}"
        blob.write_bytes(content)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(blob)
    with (folder / "ids.npy").open("wb") as stream:
        np.save(stream, np.array([1, 2, 256, 3, 4, 256, 5, 256, 6, 256], np.uint16))
    monkeypatch.chdir(tmp_path)
    return folder


def corpus_of(name: str, fraction: float = 0.3, **options: Any) -> tuple[Corpus, Account]:
    context = DataContext(ByteTokenizer(), fraction)
    part = {"name": name, **options}
    return Registry(entry_points=False).build(DATA_SOURCES, part, context, "data.source"), context.account


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}", "@refs/pr/3", "@a%2Fb"])
def test_a_dataset_is_read_as_the_folder_of_its_commit(dataset: Path, revision: str) -> None:
    name = f"hf://datasets/my-org/some-text{revision}"
    expected, _ = corpus_of("jsonl", paths=[str(dataset)])
    found, account = corpus_of("jsonl", paths=[name])
    assert found.fingerprint == expected.fingerprint
    assert found.domains == ["late", "train"]
    assert {*found.train.document_names, *found.validation.document_names} >= {"train.jsonl:1", "more/late.jsonl:1"}
    assert account.commits == {name: COMMIT}
    for path in ("/train.jsonl", "/**/train.jsonl", "/train.js*"):
        one, account = corpus_of("jsonl", paths=[name + path])
        assert one.domains == ["train"]
        assert account.commits == {name: COMMIT}
    assert corpus_of("jsonl", paths=[name + "/more"])[0].domains == ["late"]


def test_the_other_sources_take_files_of_a_dataset_too(dataset: Path) -> None:
    """And a domain that is called after its folder is not called after a commit."""
    text, _ = corpus_of("text", paths=["hf://datasets/my-org/some-text/*.txt"], separator="---")
    assert text.domains == ["some-text"]
    assert all(name.startswith("some-text/notes.txt#") for name in text.train.document_names)
    ids, account = corpus_of("tokens", train="hf://datasets/my-org/some-text/ids.npy")
    assert len(ids.train) + len(ids.validation) == 10
    assert account.commits == {"hf://datasets/my-org/some-text": COMMIT}


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        (
            "jsonl",
            "hf://datasets/my-org/absent@v2/x.jsonl",
            "hf download my-org/absent --repo-type dataset --revision v2",
        ),
        ("jsonl", "hf://datasets/my-org/some-text/absent.jsonl", "no file or folder"),
        ("jsonl", "hf://my-org/some-text", r"write hf://datasets/ORG/NAME"),
        ("jsonl", "hf://datasets/squad", r"write hf://datasets/ORG/NAME"),
        ("jsonl", "hf://datasets/my-org/some-text/../../x", r"write hf://datasets/ORG/NAME"),
        ("jsonl", "hf://datasets/my-org/some-text@..%2Fx", r"write hf://datasets/ORG/NAME"),
        ("text", "hf://datasets/my-org/some-text", r"say which, as in hf://datasets/my-org/some-text/\*\*/\*\.txt"),
    ],
)
def test_a_dataset_that_can_not_be_had_is_told_with_the_cure(
    dataset: Path, source: str, path: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        corpus_of(source, paths=[path])


def test_without_the_package_a_dataset_says_what_to_install(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"pip install 'moelab\[hub\]'"):
        corpus_of("jsonl", paths=["hf://datasets/my-org/some-text"])


@pytest.mark.parametrize(
    ("path", "fetched"),
    [
        ("", {"a.jsonl", "in/b.jsonl.gz"}),
        ("/in", {"in/b.jsonl.gz"}),
        ("/**/b.*", {"in/b.jsonl.gz", "in/b.txt"}),
        ("/in/b.txt", {"in/b.txt"}),
    ],
)
def test_only_what_is_asked_for_is_fetched(
    path: str, fetched: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ["a.jsonl", "in/b.jsonl.gz", "in/b.txt", "x.py", "README.md", "big/c.parquet"]
    asked: list[set[str]] = []

    def download(name: str, *, repo_type: str, revision: str | None, **filters: Any) -> str:
        assert (name, repo_type, revision) == ("my-org/fetched", "dataset", None if not asked else COMMIT)
        asked.append(set(import_module("huggingface_hub.utils").filter_repo_objects(there, **filters)))
        return str(tmp_path / "datasets--my-org--fetched/snapshots" / COMMIT)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "snapshot_download", download)
    for _ in range(2):  # the second time the commit of the first is asked for: a name means one in one process
        dataset_path(f"hf://datasets/my-org/fetched{path}", ("**/*.jsonl", "**/*.jsonl.gz"))
    assert asked == [fetched, fetched]


def test_the_commits_of_data_and_tokenizer_stand_in_the_summary(dataset: Path, cache: Path) -> None:
    (cache / "tokenizer.json").write_bytes(ByteTokenizer().files()["tokenizer.json"])
    words = [
        "data.source={name: jsonl, paths: [hf://datasets/my-org/some-text]}", "data.tokenizer=my-org/small",
        "train.steps=1", "train.batch_size=2", "train.sequence_length=16", "evaluation.sequences=2",
        "evaluation.sample_tokens=0", "observers=[]", "data.validation_fraction=0.3", "run_dir=run",
        "model={vocab_size: 300, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, "
        "num_attention_heads: 4, num_key_value_heads: 2}",
    ]  # fmt: skip
    session.train(moelab.load_config(*words), progress=False)
    data = json.loads(Path("run/summary.json").read_text())["data"]
    assert data["commits"] == {"hf://datasets/my-org/some-text": COMMIT}
    assert data["tokenizer_commit"] == COMMIT
