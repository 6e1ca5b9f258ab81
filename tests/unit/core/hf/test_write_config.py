"""config.json of a built model, and the complete list of reasons where there can't be one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from moelab.builder import build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.errors import CheckpointError
from moelab.hf.write_config import write_config
from moelab.nn.transformer import Transformer

LAYOUT = {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
GATED = {"name": "gated", "intermediate_size": 10}


def model(
    layers: dict[str, Any] | None = None, num_hidden_layers: int = 4, allow_noncausal: bool = False, **layout: Any
) -> Transformer:
    moe = MoEConfig(layout=LAYOUT | layout, shared_expert=GATED, layers=layers or {}, allow_noncausal=allow_noncausal)
    config = ModelConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=num_hidden_layers,
        num_attention_heads=4, num_key_value_heads=2, moe=moe,
    )  # fmt: skip
    return build_model(config, device="meta", seed=None)


def test_a_representable_model_becomes_the_fields_of_qwen2_moe():
    fields = write_config(model(), extra={"eos_token_id": 3, "router_aux_loss_coef": 0.01})
    expected = {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 6, "shared_expert_intermediate_size": 10, "norm_topk_prob": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_theta": 1e6, "rope_scaling": None,
        "torch_dtype": "bfloat16", "eos_token_id": 3, "router_aux_loss_coef": 0.01, "hidden_act": "silu",
        "use_sliding_window": False, "num_key_value_heads": 2,
    }  # fmt: skip
    assert {key: fields[key] for key in expected} == expected
    assert "head_dim" not in fields


@pytest.mark.parametrize(
    ("given", "written"),
    [((1, []), (1, [])), ((2, []), (2, [])), ((3, []), (3, [])), ((1, [0]), (1, [0])), ((2, [5]), (2, [5])),
     ((1, [0, 2, 4]), (2, [])), ((2, [1]), (2, [1])), ((4, []), (4, []))],
)  # fmt: skip
def test_sparse_layers_are_said_with_the_fewest_exceptions(
    given: tuple[int, list[int]], written: tuple[int, list[int]]
):
    fields = write_config(model(num_hidden_layers=6, decoder_sparse_step=given[0], mlp_only_layers=given[1]))
    assert (fields["decoder_sparse_step"], fields["mlp_only_layers"]) == written


def test_a_moe_config_without_sparse_layers_is_written_as_dense():
    fields = write_config(model(mlp_only_layers=[0, 1, 2, 3]))
    assert fields["model_type"] == "qwen2"
    assert "num_experts" not in fields


def test_every_reason_is_listed_layer_by_layer():
    layers = {
        "1": {"shared_expert": {"name": "none"}},
        "2": {"layout": LAYOUT | {"num_experts": 8}, "router": {"name": "softmax_topk", "norm_topk_prob": True}},
    }
    with pytest.raises(CheckpointError) as caught:
        write_config(model(layers))
    message = str(caught.value)
    assert message.count("not representable because") == 3
    assert "layer 1, shared expert: there is none, and Qwen2-MoE always has a gated one" in message
    assert "layer 2, layout: num_experts is 8, but 4 in layer 0" in message
    assert "layer 2, router: norm_topk_prob is True, but False in layer 0" in message


def test_attention_that_no_kind_has_is_refused():
    with_sinks = replace(model().config, attention_sinks=True, o_bias=True)
    with pytest.raises(CheckpointError) as caught:
        write_config(build_model(with_sinks, device="meta", seed=None))
    assert "model.attention_sinks is true, and its attention has none" in str(caught.value)
    assert "model.o_bias is true, and its o_proj has no bias" in str(caught.value)


def test_a_bias_on_the_output_alone_is_not_qwen3_moes():
    """Its attention_bias puts one on q, k, v and o, or on none."""
    config = model({str(i): {"shared_expert": {"name": "none"}} for i in range(4)}).config
    config = replace(config, use_qk_norm=True, qkv_bias=False, o_bias=True)
    with pytest.raises(CheckpointError, match=r"Qwen3-MoE can't(.|\n)*model\.o_bias is true"):
        write_config(build_model(config, device="meta", seed=None))
    written = write_config(build_model(replace(config, qkv_bias=True), device="meta", seed=None))
    assert (written["model_type"], written["attention_bias"]) == ("qwen3_moe", True)


class Stranger(nn.Module):
    """A router that knows nothing of Qwen2-MoE."""


class Modest(nn.Module):
    """A router that says why it can't."""

    def qwen2_moe_fields(self) -> str:
        return "its bias has no place there"


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (Stranger(), r"layer 3, router: \S*Stranger has no counterpart"),
        (Modest(), "layer 3, router: its bias has no place"),
    ],
)
def test_a_part_without_a_counterpart_is_named(router: nn.Module, message: str):
    built = model()
    built.layers[3].mlp.router = router
    with pytest.raises(CheckpointError, match=message):
        write_config(built)


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        ({"balance": "bias"}, "selection bias"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
        ({"n_group": 2}, "groups"),
        ({"eval_capacity_factor": 1.0}, "over capacity"),
    ],
)
def test_softmax_topk_with_an_option_that_transformers_lacks_is_refused(router: dict[str, Any], reason: str):
    """Exported as plain top-K it would load without a word and compute something else."""
    built = model({"1": {"router": {"name": "softmax_topk", **router}}}, allow_noncausal=True)
    with pytest.raises(CheckpointError, match=f"layer 1, router: .*{reason}"):
        write_config(built)


def test_capacity_in_training_alone_does_not_hinder():
    built = model({"1": {"router": {"name": "softmax_topk", "capacity_factor": 1.5}}}, allow_noncausal=True)
    assert write_config(built)["num_experts"] == 4


def test_a_parameter_without_a_place_is_named():
    built = model()
    built.layers[2].mlp.router.register_parameter("bias", nn.Parameter(torch.zeros(4)))
    with pytest.raises(CheckpointError, match=r"layers.2.mlp.router.bias \(4,\) has no place there"):
        write_config(built)


def test_what_the_model_decides_can_not_be_given():
    with pytest.raises(ValueError, match="rope_theta is decided by the model"):
        write_config(model(), extra={"rope_theta": 5.0})
