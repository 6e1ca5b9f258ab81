"""gpt-oss's config.json and names: sinks and biases in the attention, windows in every other layer, biased experts.

After transformers 5.23: models/gpt_oss/configuration_gpt_oss.py and modeling_gpt_oss.py. Free of torch.
"""

from __future__ import annotations

import re
from typing import Any

from moelab.config.model import ModelConfig, MoEConfig
from moelab.dense_sources import Part
from moelab.hf.fields import Fields
from moelab.hf.positions import ropes

# transformers', where config.json says nothing of the rotary embedding
YARN: dict[str, Any] = {
    "name": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
PACKED = "mxfp4"
_OURS = {
    re.compile(r"(model\.layers\.\d+\.mlp)\.router\.weight"): r"\1.gate.weight",
    re.compile(r"(model\.layers\.\d+\.mlp)\.router\.bias"): r"\1.router.gate_bias",
}


def complete(config: ModelConfig, fields: Fields) -> None:
    """Experts, router and activation; a loss is the training run's, so router_aux_loss_coef is left to its config."""
    packed = fields.get("quantization_config")
    if packed and (not isinstance(packed, dict) or packed.get("quant_method") != PACKED):
        fields.refuse(
            "quantization_config",
            f"of quantised weights moelab reads {PACKED}; use the checkpoint in bfloat16 that it was made from",
        )
    config.qkv_bias = config.o_bias = fields.number("attention_bias", bool, True)
    if not ropes(fields):
        config.rope_scaling = dict(YARN)
    config.activation = {
        "name": "clamped_swiglu",
        "swiglu_limit": fields.number("swiglu_limit", float, 7.0),
        "swiglu_alpha": fields.number("swiglu_alpha", float, 1.702),
    }
    config.moe = MoEConfig(
        layout={
            "name": "uniform",
            "num_experts": fields.number("num_local_experts", int, 128),
            "num_experts_per_tok": fields.number("num_experts_per_tok", int, 4),
            "moe_intermediate_size": config.intermediate_size,
        },
        router={"name": "softmax_topk", "topk_first": True, "gate_bias": True},
        shared_expert={"name": "none"},
        balance_losses=[],
    )


def parts(name: str, config: ModelConfig) -> list[Part]:
    """A stored name -> Qwen2-MoE's, or ours where that has none."""
    for theirs, ours in _OURS.items():
        if theirs.fullmatch(name):
            return [Part(theirs.sub(ours, name))]
    return [Part(name)]
