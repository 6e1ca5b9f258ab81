"""The plan of the published sizes, from headers alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from moelab.config.load import load_config
from moelab.config.run import RunConfig
from moelab.config.upcycle import UpcycleConfig
from moelab.errors import ConfigError
from moelab.hf.config import read_config
from moelab.hf.files import read_header
from moelab.hf.names import expected_tensors, hf_shapes, parameter_shapes
from moelab_upcycling.convert import prepare, registry_of
from moelab_upcycling.plan import Plan, ledger
from moelab_upcycling.source import DenseSource


def sparse_source(folder: Path, name: str) -> Path:
    """A source of full size that takes no room: a header, and a hole of zeros."""
    model = load_config([f"model/{name}", "run_dir=unused", "train.steps=1"], RunConfig).config.model
    folder.mkdir()
    raw = {k: v for k, v in vars(model).items() if k not in ("moe", "head_dim")}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **raw, "use_sliding_window": False}))
    header, offset = {}, 0
    for tensor, shape in hf_shapes(parameter_shapes(model, {})).items():
        size = 2 * math.prod(shape)
        header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return folder


def shipped_plan(source: Path, *overrides: str) -> Plan:
    loaded = load_config(["upcycle/qwen2_57b_a14b", f"source={source}", *overrides], UpcycleConfig)
    return prepare(loaded.config, registry_of(loaded.config))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return shipped_plan(sparse_source(tmp_path_factory.mktemp("7b") / "source", "qwen2-7b"))


def test_7b_becomes_57b_a14b_exactly(plan: Plan):
    assert len(plan.tensors) == 5771
    assert plan.parameters == 57_408_658_944
    assert plan.total_size == 114_817_317_888
    assert len(plan.shards) == 29
    assert max(shard.nbytes for shard in plan.shards) < 5_000_000_000


def test_the_planned_tensors_are_those_of_the_model(plan: Plan, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(plan.config_json()))
    assert {tensor.name: tensor.shape for tensor in plan.tensors} == expected_tensors(read_config(tmp_path))


def test_the_ledger_accounts_for_every_source_tensor(plan: Plan):
    source = DenseSource(Path(plan.sources[0]))
    fates = ledger(plan, [source])
    assert fates.keys() == source.tensors.keys()
    assert fates["lm_head.weight"] == "sliced: rows 152064 -> 151936"
    assert Counter(fate.split(":")[0] for fate in fates.values()) == {"copied": 28 * 9 + 1, "derived": 84, "sliced": 2}


def test_headers_are_as_safetensors_asks_and_data_is_aligned(plan: Plan, tmp_path: Path):
    for shard in plan.shards[-2:]:
        assert len(shard.header) % 4096 == 0
        path = tmp_path / "shard"
        path.write_bytes(shard.header)
        with open(path, "r+b") as file:
            file.truncate(shard.nbytes)
        assert {t.name: t.shape for t in read_header(path).values()} == {t.name: t.shape for t in shard.tensors}


def test_the_config_is_written_for_every_reader(plan: Plan):
    config = plan.config_json()
    assert config["architectures"] == ["Qwen2MoeForCausalLM"]
    assert config["rope_theta"] == 1e6
    assert "rope_parameters" not in config
    assert config["torch_dtype"] == "bfloat16"
    assert (config["num_experts"], config["num_experts_per_tok"], config["norm_topk_prob"]) == (64, 8, False)
    assert config["vocab_size"] == 151936


@pytest.mark.parametrize("name", ["qwen2-0.5b", "qwen2-1.5b", "qwen2-72b"])
def test_the_other_sizes_can_be_upcycled(tmp_path: Path, name: str):
    made = shipped_plan(sparse_source(tmp_path / "source", name), "model.moe.layout.moe_intermediate_size=704")
    (tmp_path / "config.json").write_text(json.dumps(made.config_json()))
    assert {t.name: t.shape for t in made.tensors} == expected_tensors(read_config(tmp_path))


def test_max_shard_size_is_kept_where_a_tensor_allows(plan: Plan):
    small = shipped_plan(Path(plan.sources[0]), "max_shard_size=1GB")
    assert sorted(t.name for t in small.tensors) == sorted(t.name for t in plan.tensors)
    assert all(shard.data_bytes <= 1e9 or len(shard.tensors) == 1 for shard in small.shards)
    assert all(len({t.layer_id for t in shard.tensors if t.layer_id >= 0}) <= 1 for shard in small.shards)
    with pytest.raises(ConfigError, match="write 5GB"):
        shipped_plan(Path(plan.sources[0]), "max_shard_size=5 apples")


def test_the_hash_depends_on_what_the_bytes_depend_on(plan: Plan):
    source = Path(plan.sources[0])
    assert shipped_plan(source, "workers=7").hash == plan.hash
    for override in ("seed=1", "recipe.experts.reinit_fraction=0.25", "recipe.silence=0", "max_shard_size=4GB"):
        assert shipped_plan(source, override).hash != plan.hash


@pytest.mark.parametrize("name", ["sparse", "drop", "random", "virtual_group"])
def test_the_other_shipped_recipes_fit_qwen2_7b(plan: Plan, name: str):
    loaded = load_config([f"upcycle/{name}", f"source={plan.sources[0]}"], UpcycleConfig)
    assert prepare(loaded.config, registry_of(loaded.config)).recipe.experts["name"] == name
