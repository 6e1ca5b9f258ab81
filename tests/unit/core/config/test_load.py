"""Config files and overrides: what merges, and what the user reads when something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from moelab.config.load import load_config, to_schema
from moelab.config.run import RunConfig
from moelab.config.stored import to_yaml
from moelab.errors import ConfigError

TINY = "configs/train/tiny_moe.yaml"


def _load(root: Path, *arguments: str) -> RunConfig:
    return load_config([str(root / TINY), *arguments], RunConfig).config


def _complaint(root: Path, *arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(root, *arguments)
    return str(caught.value)


def test_overrides_come_after_files(root: Path) -> None:
    assert _load(root, "train.steps=7", "train.steps=8").train.steps == 8


def test_later_files_win_and_bases_lie_below(root: Path, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 1\ntrain: {steps: 5, batch_size: 4}\n")
    (tmp_path / "top.yaml").write_text("base: base\ntrain: {batch_size: 6}\n")
    config = load_config([str(root / TINY), str(tmp_path / "top.yaml")], RunConfig).config
    assert (config.seed, config.train.steps, config.train.batch_size) == (1, 5, 6)


def test_a_base_in_a_section_takes_that_section_of_the_named_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "run_dir: x\nmodel: {base: qwen2-57b-a14b, num_hidden_layers: 2}\ntrain: {steps: 1}\n"
    )
    config = load_config([str(tmp_path / "run.yaml")], RunConfig).config
    assert config.model.hidden_size == 3584
    assert config.model.num_hidden_layers == 2
    assert config.model.moe is not None
    assert config.model.moe.layout["moe_intermediate_size"] == 2560


def test_a_changed_name_replaces_the_part_whole(root: Path) -> None:
    assert _load(root, "model.moe.router.name=other").model.moe.router == {"name": "other"}  # type: ignore[union-attr]


def test_one_item_of_a_list_is_overridden_by_its_index(root: Path) -> None:
    moe = _load(root, "model.moe.balance_losses.0.weight=0.5").model.moe
    assert moe is not None
    assert moe.balance_losses == [{"name": "load_balance", "weight": 0.5, "scope": "global"}]


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b\n")
    (tmp_path / "b.yaml").write_text("base: a\n")
    with pytest.raises(ConfigError, match="circle"):
        load_config([str(tmp_path / "a.yaml")], RunConfig)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hidden_sise=3", ["model.hidden_sise", "did you mean 'hidden_size'"]),
        ("trian.steps=3", ["trian", "did you mean 'train'"]),
        ("model.hidden_size=wide", ["model.hidden_size", "wide", "Integer"]),
        ("model.num_attention_heads=5", ["model.num_attention_heads", "does not divide hidden_size 64"]),
        ("model.num_key_value_heads=3", ["model.num_key_value_heads", "num_attention_heads 4"]),
        ("train.micro_batch_size=3", ["train.micro_batch_size", "batch_size 8"]),
        ("train.dtype=float8", ["train.dtype", "bfloat16"]),
        ("schedule.name=linear", ["schedule.name", "cosine"]),
        ("optimizer.lr=-1", ["optimizer.lr", "positive"]),
        ("train.sequence_length=4096", ["train.sequence_length", "max_position_embeddings 1024"]),
        ("train.steps=0", ["train.steps", "at least 1"]),
    ],
)
def test_a_wrong_value_is_one_message_with_key_cure_and_origin(root: Path, override: str, words: list[str]) -> None:
    complaint = _complaint(root, override)
    for word in [*words, f"set by {override}"]:
        assert word in complaint
    assert "\n" not in complaint


def test_a_key_of_a_file_is_blamed_on_the_file(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("train: {stepz: 3}\n")
    with pytest.raises(ConfigError, match=r"train\.stepz: no such key, did you mean 'steps'.*wrong\.yaml"):
        load_config([str(root / TINY), str(path)], RunConfig)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: [1", b"- 1\n- 2\n"])
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config([str(path)], RunConfig)


def test_a_missing_value_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="run_dir: has no value yet"):
        load_config(["train.steps=3"], RunConfig)


def test_a_missing_file_lists_where_it_was_looked_for() -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(["configs/train/nope.yaml"], RunConfig)


def test_the_resolved_config_reads_back_the_same(root: Path) -> None:
    config = _load(root)
    tree = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    assert isinstance(tree, dict)
    assert to_schema({str(k): v for k, v in tree.items()}, RunConfig) == config


def test_every_shipped_training_config_loads(root: Path) -> None:
    files = [*root.glob("configs/train/*.yaml"), *root.glob("configs/experiments/**/*.yaml")]
    runnable = [
        f
        for f in files
        if f.name not in ("common.yaml", "continue.yaml", "upcycle.yaml", "corpus.yaml", "experiment.yaml")
    ]
    assert runnable
    for path in runnable:
        begins = ["train.init_from=there"] if "alignment:" in path.read_text() else []
        load_config([str(path), *begins], RunConfig)
