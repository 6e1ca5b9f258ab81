"""Verification finds a single flipped byte, and says where."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dense_checkpoints import Tiny, recipe_config, upcycle, write_dense
from moelab.errors import CheckpointError
from moelab.hf.files import read_header
from moelab_upcycling.verify import Verdict, plan_of_output, verify


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("verify") / "dense", Tiny(layers=2))


@pytest.fixture(scope="module")
def untouched(source: Path) -> Path:
    upcycle(recipe_config(source), source.parent / "out")
    return source.parent / "out"


@pytest.fixture
def output(untouched: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(untouched, tmp_path / "out"))


def check(output: Path, source: Path, full: bool = False) -> Verdict:
    return verify(output, plan_of_output(output, [source]), full=full)


def flip(output: Path, name: str, row: int, column: int) -> str:
    """Change one bit of one value; returns what the message must hold."""
    for path in output.glob("*.safetensors"):
        tensor = read_header(path).get(name)
        if tensor is not None:
            place = tensor.offset + 2 * (row * tensor.shape[1] + column) + 1
            data = bytearray(path.read_bytes())
            data[place] ^= 16
            path.write_bytes(data)
            return f"byte {place}: '{name}' differs at row {row}, column {column}"
    raise AssertionError(name)


def test_an_untouched_checkpoint_passes(output: Path, source: Path):
    verdict = check(output, source, full=True)
    assert not verdict.differences
    assert verdict.tensors == verdict.total == 2 * 206 + 3
    sampled = check(output, source)
    assert not sampled.differences
    assert sampled.tensors == 2 * (206 - 63 * 3) + 3


@pytest.mark.parametrize("expert", [0, 33, 63])
def test_any_flipped_byte_is_found_by_the_full_check(output: Path, source: Path, expert: int):
    words = flip(output, f"model.layers.1.mlp.experts.{expert}.down_proj.weight", 31, 79)
    (difference,) = check(output, source, full=True).differences
    assert words in difference


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.shared_expert.down_proj.weight",
        "model.layers.0.mlp.shared_expert_gate.weight",
    ],
)
def test_the_sample_holds_whatever_is_no_expert(output: Path, source: Path, name: str):
    words = flip(output, name, 0, 3)
    (difference,) = check(output, source).differences
    assert words in difference


def test_a_missing_index_or_a_changed_config_is_reported(output: Path, source: Path):
    config = output / "config.json"
    config.write_text(config.read_text().replace('"num_experts_per_tok": 8', '"num_experts_per_tok": 4'))
    (difference,) = check(output, source).differences
    assert "num_experts_per_tok changed" in difference
    (output / "model.safetensors.index.json").unlink()
    assert "not complete" in check(output, source).differences[0]


def test_a_shard_that_is_cut_short_or_gone_is_reported(output: Path, source: Path):
    first, second, _ = sorted(output.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    differences = check(output, source).differences
    assert len(differences) == 2
    assert "bytes, should have" in differences[0]
    assert "can't be opened" in differences[1]


def test_another_source_is_refused(output: Path, tmp_path: Path):
    other = write_dense(tmp_path / "other", Tiny(seed=7))
    with pytest.raises(CheckpointError, match="made from other sources"):
        plan_of_output(output, [other])
