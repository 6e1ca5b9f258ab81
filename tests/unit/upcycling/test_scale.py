"""A published recipe's proportions at other widths: the arithmetic, its overrides, and the published numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moelab
from dense_checkpoints import Tiny, plan_for, write_dense
from moelab import session
from moelab.config.model import ModelConfig
from moelab.config.upcycle import UpcycleConfig
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.errors import ConfigError
from moelab.hf.moe_formats import MOE_FORMATS
from moelab.hf.save import save_hf
from moelab_tools.upcycling import spelled_out
from moelab_upcycling.convert import convert
from moelab_upcycling.scale import scaled
from unit.upcycling.test_plan import shipped_plan, sparse_source

QWEN2_MOE, QWEN3_MOE = MOE_FORMATS["qwen2_moe"], MOE_FORMATS["qwen3_moe"]


def source_of(width: int, rows: int = 49152) -> ModelConfig:
    return ModelConfig(rows, 576, width, 30, 9, 3)


def scale(width: int, kind: str = "qwen2_moe", rows: int = 49152, **model: object) -> UpcycleConfig:
    config = UpcycleConfig(source="unused", scale="qwen2-57b-a14b", model=dict(model))
    return scaled(config, source_of(width, rows), MOE_FORMATS[kind])[0]


def test_qwen2_7b_gives_the_published_sizes(tmp_path: Path):
    source = sparse_source(tmp_path / "source", "qwen2-7b")
    made = plan_for(UpcycleConfig(source=str(source), scale="qwen2-57b-a14b"))
    assert made.parameters == 57_408_658_944
    assert made.target.config == shipped_plan(source).target.config


@pytest.mark.parametrize(("width", "expert"), [(18944, 2560), (1536, 208), (4864, 656), (29568, 3992), (20, 8)])
def test_the_expert_width_is_in_proportion_to_the_nearest_multiple_of_eight(width: int, expert: int):
    moe = scale(width).model["moe"]
    assert moe["layout"]["moe_intermediate_size"] == expert
    assert moe["shared_expert"]["intermediate_size"] == 8 * expert


def test_what_follows_from_an_overridden_number_follows_it():
    moe = scale(1536, moe={"layout": {"num_experts_per_tok": 4, "moe_intermediate_size": 100}}).model["moe"]
    assert moe["layout"] == {
        "name": "uniform", "num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 100,
    }  # fmt: skip
    assert moe["shared_expert"] == {"name": "gated", "intermediate_size": 400}


def test_only_the_published_padding_is_cut():
    assert scale(18944, rows=152064).model["vocab_size"] == 151936
    assert scale(1536).model["vocab_size"] == 49152
    assert scale(18944, rows=152064, vocab_size=None).model["vocab_size"] is None


def test_a_target_without_a_shared_expert_begins_as_the_source():
    config = scale(1536, "qwen3_moe")
    assert config.model["moe"]["shared_expert"] == {"name": "none"}
    assert config.model["moe"]["router"]["norm_topk_prob"] is True
    assert (config.recipe.experts["name"], config.recipe.scaling["share"]) == ("virtual_group", 1.0)


def test_every_number_is_told_with_where_it_comes_from():
    config = UpcycleConfig(source="unused", scale="qwen2-57b-a14b", model={"moe": {"layout": {"num_experts": 32}}})
    told = "\n".join(scaled(config, source_of(1536), QWEN2_MOE)[1])
    for words in (
        "num_experts: 32, as given",
        "208 = 1536 x 2560 / 18944 = 207.568",
        "1664 = 8 experts of 208",
        "4.33",
    ):
        assert words in told


def test_an_unknown_scale_is_named():
    config = UpcycleConfig(source="unused", scale="qwen2-57b")
    with pytest.raises(ConfigError, match=r"scale: no 'qwen2-57b'.*qwen2-57b-a14b"):
        scaled(config, source_of(1536), QWEN3_MOE)


def test_a_source_and_an_output_are_a_whole_command(tmp_path: Path):
    source = write_dense(tmp_path / "dense", Tiny(layers=1))
    given = spelled_out([str(source), str(tmp_path / "out"), "seed=3"])
    assert given == [f'source="{source}"', f'output="{tmp_path / "out"}"', "scale=qwen2-57b-a14b", "seed=3"]
    for absent in ("nowhere", "org/name@main"):  # told as a source that is not there, or looked up on the hub
        assert spelled_out([absent, "out"])[0] == f'source="{absent}"'
    for configs in (["mistyped.yaml", "out"], ["nowhere", "upcycle/sparse"], ["upcycle/sparse", "other"]):
        assert spelled_out(configs) == configs
    assert spelled_out(["configs/upcycle/sparse.yaml", "source=x"]) == ["configs/upcycle/sparse.yaml", "source=x"]


def test_a_source_whose_target_has_no_shared_expert_is_scaled_and_trained_on(tmp_path: Path):
    """A Qwen3 becomes a Qwen3-MoE: it begins at the dense loss, and its experts and routers learn from there."""
    dense = ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, qkv_bias=False, use_qk_norm=True, tie_word_embeddings=True,
        max_position_embeddings=64,
    )  # fmt: skip
    save_hf(moelab.build(dense, seed=3), tmp_path / "dense", dtype=torch.float32, extra_files=ByteTokenizer().files())
    config = UpcycleConfig(source=str(tmp_path / "dense"), scale="qwen2-57b-a14b")
    convert(plan_for(config), tmp_path / "moe", workers=1)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "{"one and two " * (10 + number)}"}}\n' for number in range(12)))
    words = [
        f"data.source={{name: jsonl, paths: [{text}]}}", "data.validation_fraction=0.3", "train.steps=3",
        "train.batch_size=2", "train.sequence_length=32", "train.log_every=1", "evaluation.sequences=4",
        "evaluation.sample_tokens=0", "optimizer.lr=0.01", "observers=[]",
    ]  # fmt: skip
    runs = {
        name: session.train(
            moelab.load_config(*words, f"train.init_from={tmp_path / name}", f"run_dir={tmp_path / 'runs' / name}"),
            progress=False,
        )
        for name in ("dense", "moe")
    }
    losses = {name: [row["eval/loss"] for row in run.metrics if "eval/loss" in row] for name, run in runs.items()}
    assert losses["moe"][0] == pytest.approx(losses["dense"][0], rel=1e-5)
    assert losses["moe"][-1] < losses["moe"][0]
    before, after = moelab.load(tmp_path / "moe").state_dict(), runs["moe"].model.state_dict()
    assert "layers.0.mlp.router.weight" in after
    assert not any("shared" in name for name in after)
    assert not any(value.equal(after[name]) for name, value in before.items() if ".mlp." in name)
