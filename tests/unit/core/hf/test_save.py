"""A checkpoint is written whole or not at all, and never over something else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moelab import atomic
from moelab.builder import build_model
from moelab.config.model import ModelConfig
from moelab.errors import CheckpointError, UserError
from moelab.hf import save
from moelab.hf.load import load_hf
from moelab.hf.save import parse_size, save_hf
from moelab.nn.transformer import Transformer


def small_model(seed: int = 0, tied: bool = False) -> Transformer:
    config = ModelConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return build_model(config, seed=seed)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_small_checkpoint_is_one_file_without_an_index(tmp_path: Path):
    save_hf(small_model(), tmp_path / "out")
    assert names(tmp_path / "out") == ["config.json", "model.safetensors"]
    assert names(tmp_path) == ["out"]
    with safe_open(str(tmp_path / "out" / "model.safetensors"), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_a_large_checkpoint_is_cut_into_shards_that_the_index_describes(tmp_path: Path):
    limit = 4000
    save_hf(small_model(), tmp_path, dtype=torch.float32, max_shard_size=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    count = len(shards)
    assert count > 2
    assert [path.name for path in shards] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    found = {name: (path.name, tensor) for path in shards for name, tensor in load_file(path).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in found.values())
    for path in shards:
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= limit


def test_a_tied_head_is_left_out(tmp_path: Path):
    save_hf(small_model(tied=True), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_ids_and_further_files_are_carried(tmp_path: Path):
    save_hf(small_model(), tmp_path, config_extra={"bos_token_id": 4, "eos_token_id": 5}, extra_files={"t.json": b"{}"})
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 5
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (4, 5)
    assert (tmp_path / "t.json").read_bytes() == b"{}"


@pytest.mark.parametrize("name", ["../escape", "config.json", "a/b"])
def test_further_files_stay_inside_and_replace_nothing(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="not the name of one more file"):
        save_hf(small_model(), tmp_path / "out", extra_files={name: b""})
    assert names(tmp_path) == []


def test_an_existing_folder_is_refused_unless_forced(tmp_path: Path):
    save_hf(small_model(seed=0), tmp_path / "out", dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"out: exists and is not empty; .*--force"):
        save_hf(small_model(seed=1), tmp_path / "out", dtype=torch.float32)
    assert torch.equal(load_hf(tmp_path / "out").embed_tokens.weight, small_model(seed=0).embed_tokens.weight)
    save_hf(small_model(seed=1), tmp_path / "out", dtype=torch.float32, force=True)
    assert torch.equal(load_hf(tmp_path / "out").embed_tokens.weight, small_model(seed=1).embed_tokens.weight)
    assert names(tmp_path) == ["out"]


def test_force_does_not_delete_what_is_no_checkpoint(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        save_hf(small_model(), tmp_path, force=True)
    assert names(tmp_path) == ["thesis.tex"]


def test_a_file_in_the_way_is_refused(tmp_path: Path):
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="out: is a file"):
        save_hf(small_model(), tmp_path / "out", force=True)


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_half_way_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool):
    """Disk full at the second shard: no new folder, no temporary one, the old checkpoint as it was."""
    if existing:
        save_hf(small_model(seed=0), tmp_path / "out", dtype=torch.float32)
    calls, write = [], save.write_tensors

    def full(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(*arguments, **options)

    monkeypatch.setattr(save, "write_tensors", full)
    with pytest.raises(CheckpointError, match=r"out: can't be written: .*No space left"):
        save_hf(small_model(seed=1), tmp_path / "out", max_shard_size=4000, force=True)
    assert names(tmp_path) == (["out"] if existing else [])
    if existing:
        assert torch.equal(load_hf(tmp_path / "out").embed_tokens.weight, small_model(seed=0).embed_tokens.weight)


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_failed_rename_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanged: bool):
    save_hf(small_model(seed=0), tmp_path / "out", dtype=torch.float32)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    def fail_too(one: Path, other: Path) -> bool:
        if exchanged:
            raise OSError(5, "Input/output error")
        return False

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(atomic, "exchange", fail_too)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_hf(small_model(seed=1), tmp_path / "out", force=True)
    assert names(tmp_path) == ["out"]
    assert torch.equal(load_hf(tmp_path / "out").embed_tokens.weight, small_model(seed=0).embed_tokens.weight)


def test_what_a_killed_writer_left_goes_and_is_told_with_its_size(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(bytes(5 * 10**6))
    (tmp_path / ".out.lock").write_text('{"host": "node7", "pid": 7}')
    save_hf(small_model(), tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["config.json", "model.safetensors"]
    assert "removed .out.partial, 5.0 MB that a killed command left" in caplog.text


def test_what_a_killed_writer_left_goes_even_where_the_next_one_is_refused(tmp_path: Path):
    save_hf(small_model(), tmp_path / "out")
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(CheckpointError, match="is not empty"):
        save_hf(small_model(), tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_what_a_living_writer_writes_is_not_touched(tmp_path: Path):
    with save.new_folder(tmp_path / "out") as (temporary, _):
        (temporary / "config.json").write_text("{}")
        with pytest.raises(UserError, match=r"out: is being written by process \d+ on \S+, since 20"):
            save_hf(small_model(), tmp_path / "out", force=True)
        assert names(temporary) == ["config.json"]
    assert names(tmp_path) == ["out"]


def test_files_are_synced_before_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), sync(descriptor)))
    monkeypatch.setattr(Path, "rename", lambda self, target: (events.append("rename"), rename(self, target))[1])
    save_hf(small_model(), tmp_path / "out")
    # config.json, model.safetensors and their folder; then the parent, which holds the new name
    assert events == ["sync", "sync", "sync", "rename", "sync"]


def test_a_place_that_can_not_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"can't be written: .*choose another folder"):
        save_hf(small_model(), tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("size", "expected"), [("5GB", 5 * 10**9), ("1.5 GiB", 3 * 2**29), (77, 77), ("300", 300), ("2mb", 2 * 10**6)]
)
def test_sizes_are_read_as_hugging_face_reads_them(size: int | str, expected: int):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "lots", "-5GB", "0", 0, "5G", "5 XB"])
def test_a_size_that_is_none_is_refused(size: int | str):
    with pytest.raises(CheckpointError, match="max_shard_size"):
        parse_size(size)
