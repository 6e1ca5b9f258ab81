"""Names on the hub, from a cache laid out by hand: no network is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import moelab
from moelab import session
from moelab.config.model import ModelConfig
from moelab.errors import CheckpointError
from moelab.hf.save import save_hf
from moelab.hub import ALLOWED, REFUSED, commit_of, user_folder
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


@pytest.mark.parametrize("name", ["my-org/small", "my-org/small@main", f"my-org/small@{COMMIT}"])
def test_a_name_in_the_cache_is_the_folder_of_its_commit(cache: Path, name: str) -> None:
    assert user_folder(name).resolve() == cache.resolve()
    assert read_origin(name).model.hidden_size == 32
    found = origin_of({"train": {"init_from": name}})
    assert found is not None
    assert found.folder.name == COMMIT


def test_what_begins_with_a_folder_that_is_there_is_a_path(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "my-org").mkdir()
    assert user_folder("my-org/small").resolve() == (tmp_path / "my-org/small").resolve()


def test_what_is_not_there_is_said_with_how_to_fetch_it(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="hf download my-org/absent --revision v2"):
        user_folder("my-org/absent@v2")


def test_nothing_that_runs_is_fetched() -> None:
    filtered = hub.utils.filter_repo_objects(
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
