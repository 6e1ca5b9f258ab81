"""A folder that could be read in two ways: every reader refuses it, in the same words, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dense_checkpoints import Tiny, dense_tensors, plan_for, recipe_config, upcycle, write_dense
from moelab import load
from moelab.errors import CheckpointError
from moelab_tools.cli import run
from moelab_upcycling.verify import plan_of_output


def _index_beside_single(folder: Path) -> None:
    write_dense(folder.with_name("sharded"), shards=3, tiny=Tiny(seed=1, vocab=300))
    for path in folder.with_name("sharded").glob("model*"):
        shutil.copy(path, folder)


def _change(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def _another_head(folder: Path) -> None:
    _change(folder, tie_word_embeddings=True)


def _rounded_head(folder: Path) -> None:
    """The same numbers in another format: the one reader computes with these, the other with those."""
    rounded = dense_tensors(Tiny(dtype=torch.float32, vocab=300))["model.embed_tokens.weight"].to(torch.bfloat16)
    write_dense(folder, Tiny(tied=True, dtype=torch.float32, vocab=300), lm_head__weight=rounded)


FAULTS: dict[str, Callable[[Path], None]] = {
    "index beside single file": _index_beside_single,
    "a head that is not the embedding": _another_head,
    "a head in another format than the embedding": _rounded_head,
    "two thetas": lambda folder: _change(folder, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "a theta in rope_scaling": lambda folder: _change(folder, rope_scaling={"rope_type": "default", "rope_theta": 1e4}),
    "two dtypes": lambda folder: _change(folder, dtype="float32"),
    "an adapter": lambda folder: (folder / "adapter_config.json").write_text("{}") and None,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_every_reader_refuses_in_the_same_words(tmp_path: Path, fault: Callable[[Path], None], capsys):
    folder = write_dense(tmp_path / "dense", Tiny(vocab=300))
    fault(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    words = str(caught.value)
    data = tmp_path / "data.yaml"
    data.write_text("data: {tokenizer: bytes}\ntrain: {steps: 1, sequence_length: 8}\nevaluation: {sequences: 2}\n")
    assert str(folder) in words
    with pytest.raises(CheckpointError) as caught:
        plan_for(recipe_config(folder))
    assert str(caught.value) == words
    for command in (
        ["upcycle", "configs/upcycle/qwen2_57b_a14b.yaml", "model.vocab_size=null", f"source={folder}"],
        ["export", str(folder)],
        ["train", str(data), f"train.init_from={folder}"],
        ["generate", str(folder), "--tokenizer", "bytes"],
    ):
        place = {"upcycle": f"output={tmp_path / 'out'}", "export": str(tmp_path / "out"), "generate": "--tokens=1"}
        assert run([*command, place.get(command[0], f"run_dir={tmp_path / 'out'}")]) == 2, command
        assert words in capsys.readouterr().err, command
        assert not (tmp_path / "out").exists(), command


def test_what_is_written_holds_no_field_that_reading_leaves_out(tmp_path: Path, caplog) -> None:
    """A field of ModelConfig that config.json has no name for (sinks, latent attention) would be told as a stranger."""
    upcycle(recipe_config(write_dense(tmp_path / "dense")), tmp_path / "out")
    caplog.clear()
    load(tmp_path / "out", device="meta")
    assert not caplog.records


def test_verify_reads_the_source_and_the_output_as_loading_does(tmp_path: Path, capsys):
    from dense_checkpoints import upcycle

    folder = write_dense(tmp_path / "dense", Tiny(layers=1))
    upcycle(recipe_config(folder), tmp_path / "made")
    _change(folder, dtype="float32")
    with pytest.raises(CheckpointError, match="contradict each other"):
        plan_of_output(tmp_path / "made", [folder])
    write_dense(folder, Tiny(layers=1))
    shutil.copy(folder / "model.safetensors", tmp_path / "made")
    assert run(["verify", str(tmp_path / "made"), "--source", str(folder)]) == 2
    assert "holds both model.safetensors and model.safetensors.index.json" in capsys.readouterr().err
