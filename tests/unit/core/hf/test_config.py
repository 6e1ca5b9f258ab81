"""config.json in both styles; what would compute something else is refused with file, key, value and cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moelab.errors import CheckpointError
from moelab.hf.config import read_config
from moelab.origin import carried_ids, end_token_ids

DENSE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 50, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "hidden_act": "silu", "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": 131072,
    "max_window_layers": 24, "bos_token_id": 7, "eos_token_id": [7, 8], "max_position_embeddings": 131072,
}  # fmt: skip
MOE: dict[str, Any] = DENSE | {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "shared_expert_intermediate_size": 20, "norm_topk_prob": True,
    "router_aux_loss_coef": 0.001,
}  # fmt: skip


def write(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def without(fields: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in keys}


def test_a_dense_config_in_the_style_of_transformers_4(tmp_path: Path):
    config = read_config(write(tmp_path, DENSE))
    assert config.moe is None
    assert (config.vocab_size, config.hidden_size, config.num_key_value_heads) == (50, 16, 2)
    assert (config.rope_theta, config.rms_norm_eps, config.tie_word_embeddings) == (1e6, 1e-6, True)
    assert config.max_position_embeddings == 131072


def test_both_styles_of_transformers_mean_the_same(tmp_path: Path):
    new = without(MOE, "rope_theta", "torch_dtype") | {
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "dtype": "bfloat16",
        "layer_types": ["full_attention"] * 4, "sliding_window": 0, "mlp_only_layers": [], "qkv_bias": True,
    }  # fmt: skip
    old = read_config(write(tmp_path, MOE | {"rope_scaling": None}))
    assert read_config(write(tmp_path, new)) == old


def test_moe_fields_become_parts(tmp_path: Path):
    moe = read_config(write(tmp_path, MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [3]})).moe
    assert moe is not None
    assert moe.layout == {
        "name": "uniform", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
        "decoder_sparse_step": 2, "mlp_only_layers": [3],
    }  # fmt: skip
    assert moe.router == {"name": "softmax_topk", "norm_topk_prob": True}
    assert moe.shared_expert == {"name": "gated", "intermediate_size": 20}
    assert moe.balance_losses == []


def test_norm_topk_prob_is_false_where_it_is_absent(tmp_path: Path):
    """Qwen2-MoE's default; Qwen3-MoE's is true."""
    moe = read_config(write(tmp_path, without(MOE, "norm_topk_prob"))).moe
    assert moe is not None
    assert moe.router["norm_topk_prob"] is False


def test_no_experts_means_dense(tmp_path: Path):
    assert read_config(write(tmp_path, MOE | {"num_experts": 0})).moe is None


def test_without_any_theta_transformers_takes_ten_thousand(tmp_path: Path):
    assert read_config(write(tmp_path, without(DENSE, "rope_theta"))).rope_theta == 10_000.0


def test_null_key_value_heads_are_as_many_as_heads(tmp_path: Path):
    assert read_config(write(tmp_path, DENSE | {"num_key_value_heads": None})).num_key_value_heads == 4


def test_token_ids_are_carried(tmp_path: Path):
    assert carried_ids(write(tmp_path, DENSE)) == {"bos_token_id": 7, "eos_token_id": [7, 8]}


def test_a_text_ends_where_generation_config_says_and_else_where_config_says(tmp_path: Path):
    assert end_token_ids(write(tmp_path, DENSE)) == ((7, 8), "config.json")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert end_token_ids(tmp_path) == ((9,), "generation_config.json")
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7}')
    assert end_token_ids(tmp_path) == ((7, 8), "config.json")
    assert end_token_ids(write(tmp_path, without(DENSE, "eos_token_id"))) is None


@pytest.mark.parametrize("value", ["</s>", [], [1, "2"], True, -1, {"a": 1}])
def test_an_end_that_is_no_token_id_is_refused(tmp_path: Path, value: Any):
    (write(tmp_path, DENSE) / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id: must be a token id"):
        end_token_ids(tmp_path)


REFUSED = {
    "another model": ({"model_type": "gpt2"}, r'model_type: "gpt2" is not supported; moelab reads gemma,.*hook'),
    "no model type": ({"model_type": None}, "model_type: null is not supported"),
    "another head": ({"architectures": ["Qwen2ForTokenClassification"]}, r"architectures: .*Qwen2ForCausalLM"),
    "sliding layers without a window": (
        {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types: .*must be .*full_attention",
    ),
    "other layers": ({"layer_types": ["chunked_attention"] * 4}, "layer_types: .*sliding_attention"),
    "layer types of another model": (
        {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": True}, "layer_types: .*must name 4 layers",
    ),
    "a window less than nothing": ({"use_sliding_window": True, "sliding_window": -1}, "sliding_window: -1 .*positive"),
    "unknown rope": ({"rope_scaling": {"type": "su", "factor": 4.0}}, "rope_scaling.name: no rope scaling 'su'.*yarn"),
    "rope of images": (
        {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "rope_scaling.name: no rope scaling 'mrope'",
    ),
    "a number that yarn hasn't": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "gamma": 1}}, "rope_parameters.gamma: 'yarn' .*no",
    ),
    "yarn that shortens": ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "rope_scaling: 'yarn' .*at least 1"),
    "a factor without a type": ({"rope_scaling": {"factor": 4.0}}, "rope_scaling: .*say its .*rope_type"),
    "two types": (
        {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, "rope_scaling: .*contradict",
    ),
    "chunks and windows": (
        {"dual_chunk_attention_config": {}, "use_sliding_window": True, "max_window_layers": 0}, "dual_chunk.*only one",
    ),
    "chosen keys": (
        {"dual_chunk_attention_config": {"sparse_attention_enabled": True}}, "sparse_attention_enabled: .*remove",
    ),
    "chunks that are all local": (
        {"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 8}}, "chunk_size must exceed local_size",
    ),
    "partial rotary": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters: .*whole heads",
    ),
    "rope for each kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters: .*the same in all layers",
    ),
    "two thetas": (
        {"rope_parameters": {"rope_theta": 5e5}},
        r"rope_theta 1000000.0 and rope_parameters.rope_theta 500000.0 contradict .*4.x takes the first",
    ),
    "two thetas, one in rope_scaling": (
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
        r"rope_theta 1000000.0 and rope_scaling.rope_theta 500000.0 contradict",
    ),
    "two thetas without one at the top": (
        {
            "rope_theta": None, "rope_scaling": {"rope_type": "default", "rope_theta": 1e4},
            "rope_parameters": {"rope_theta": 1e6},
        },
        r"rope_scaling.rope_theta 10000.0 and rope_parameters.rope_theta 1000000.0 contradict",
    ),
    "two dtypes": ({"dtype": "float32"}, "torch_dtype bfloat16 and dtype float32 contradict each other"),
    "layer types that are no list": ({"layer_types": 1}, "layer_types: 1 .*must be a list"),
    "a model type that is no text": ({"model_type": {"a": 1}}, "model_type: .* is not supported"),
    "no attention biases": ({"attention_bias": False}, "attention_bias: false .*add zero biases"),
    "biases in the FFN": ({"mlp_bias": True}, "mlp_bias: true .*no biases"),
    "partial rotary at the top": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 .*plain rotary"),
    "scaled logits": ({"logits_scaling": 8.0}, "logits_scaling: 8.0 .*doesn't scale"),
    "capped logits": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0 .*doesn't cap"),
    "gelu": ({"hidden_act": "gelu"}, 'hidden_act: "gelu" is not supported; it must be "silu"'),
    "no biases": ({"qkv_bias": False}, "qkv_bias: false .*add zero biases"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout: 0.1 .*set it to 0.0"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config: .*that it was made from"),
    "missing size": ({"hidden_size": None}, "hidden_size: is missing; it must be a int"),
    "text for a number": ({"hidden_size": "16"}, "hidden_size: must be a int, not '16'"),
    "a truth for a number": ({"num_attention_heads": True}, "num_attention_heads: must be a int, not True"),
    "a number for a truth": ({"tie_word_embeddings": 1}, "tie_word_embeddings: must be a bool, not 1"),
    "heads do not divide": ({"num_attention_heads": 3, "num_key_value_heads": 3}, r"num_attention_heads: 3 does not"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_compute_something_else_is_refused(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(write(tmp_path, DENSE | change))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_one_theta_said_in_three_places_is_one(tmp_path: Path):
    fields = {"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}, "rope_parameters": {"rope_theta": 1000000}}
    assert read_config(write(tmp_path, DENSE | fields)).rope_theta == 1e6
    assert read_config(write(tmp_path, without(DENSE | fields, "rope_theta", "rope_parameters"))).rope_theta == 1e6


def test_a_window_is_that_of_the_layers_that_its_kind_gives_it(tmp_path: Path):
    """A dense Qwen2's from max_window_layers on; of a Qwen2-MoE every other one before it; or layer_types'."""

    def attention(base: dict[str, Any], **fields: Any) -> Any:
        return read_config(write(tmp_path, base | {"use_sliding_window": True, "sliding_window": 6} | fields)).attention

    assert attention(DENSE, max_window_layers=4) is None
    assert attention(DENSE, max_window_layers=3) == {"name": "sliding_window", "window": 6, "layers": "3"}
    assert attention(DENSE, max_window_layers=0) == {"name": "sliding_window", "window": 6}
    assert attention(MOE, max_window_layers=3) == {"name": "sliding_window", "window": 6, "layers": "0,2"}
    types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    for base in (DENSE, MOE):
        assert attention(base, layer_types=types) == {"name": "sliding_window", "window": 6, "layers": "1"}
        assert attention(base, sliding_window=None) is None


ROPES = {
    "old": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "newer": {"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64}},
    "both keys": {
        "rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "transformers 5": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6,
            "beta_fast": None,
        },
    },
    "at the top": {"original_max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
}  # fmt: skip


@pytest.mark.parametrize("said", ROPES.values(), ids=ROPES.keys())
def test_every_published_form_of_a_rope_scaling_is_read(
    tmp_path: Path, said: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    found = read_config(write(tmp_path, DENSE | said)).rope_scaling
    assert found == {"name": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert not caplog.records


def test_the_trained_length_of_llama3_is_the_longest_sequence_where_none_is_said(tmp_path: Path):
    said = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    found = read_config(write(tmp_path, DENSE | {"rope_scaling": said})).rope_scaling
    assert found is not None
    assert found["original_max_position_embeddings"] == DENSE["max_position_embeddings"]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"original_max_position_embeddings": 32, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
          "original_max_position_embeddings": 64}},
         "original_max_position_embeddings 32 and rope_scaling.original_max_position_embeddings 64 contradict"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 7}},
         "original_max_position_embeddings: 7 is not max_position_embeddings, which transformers takes for dynamic"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "its rope_type must be a name"),
    ],
)  # fmt: skip
def test_a_trained_length_that_transformers_takes_otherwise_is_refused(tmp_path: Path, said: dict[str, Any], told: str):
    with pytest.raises(CheckpointError, match=told):
        read_config(write(tmp_path, DENSE | said))


def test_chunks_are_read_as_vllm_has_them(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    chunks = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    found = read_config(write(tmp_path, DENSE | {"dual_chunk_attention_config": chunks})).attention
    assert found == {
        "name": "dual_chunk", "preset": "qwen_1m", "original_max_position_embeddings": 262144, "local": 8192,
        "temperature": "per_query", "temperature_from": 262144,
    }  # fmt: skip
    assert "vLLM multiplies" in caplog.text


def test_a_field_that_nobody_knows_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    read_config(write(tmp_path, DENSE | MOE | {"router_aux_loss_coef": 0.1, "transformers_version": "5.23.0"}))
    assert not caplog.records
    read_config(write(tmp_path, DENSE | {"value_residual": True}))
    assert "value_residual: not known to moelab" in caplog.text


@pytest.mark.parametrize("change", [{"decoder_sparse_step": 0}, {"mlp_only_layers": "none"}, {"num_experts": None}])
def test_bad_moe_fields_are_refused_by_name(tmp_path: Path, change: dict[str, Any]):
    with pytest.raises(CheckpointError, match=next(iter(change))):
        read_config(write(tmp_path, MOE | change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is no UTF-8 text"),
        (b"[1]", "holds a list, not an object"),
        (b"[" * 30000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)
