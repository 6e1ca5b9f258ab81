"""DeepSeek-V2, V3 and Kimi K2 as transformers stores them: latent attention, first layers dense, plain shared expert.

After transformers 5.23, models/{deepseek_v2,deepseek_v3}/configuration_*.py and modeling_*.py, and the published
config.json files' own fields (`topk_method`, `scoring_func`, `moe_layer_freq`). Kimi K2 is DeepSeek-V3 under a
`model_type` of its own (MoonshotAI/Kimi-K2, docs/deploy_guidance.md: a reader may take it for deepseek_v3; vLLM's
config table does). Free of torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moelab.config.latent_attention import LatentAttentionConfig
from moelab.config.model import ModelConfig, MoEConfig
from moelab.dense_sources import Part
from moelab.hf.fields import Fields

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Fields that are read here, or say how a model is run or was trained.
UNUSED = frozenset({
    "attention_bias", "aux_loss_alpha", "ep_size", "first_k_dense_replace", "kv_lora_rank", "n_group",
    "n_routed_experts", "n_shared_experts", "num_local_experts", "num_mtp_layers", "num_nextn_predict_layers",
    "pretraining_tp", "q_lora_rank", "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "rope_interleave",
    "routed_scaling_factor", "seq_aux", "topk_group", "v_head_dim",
})  # fmt: skip
_SAME: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "moe_layer_freq": ((1,), "layers above first_k_dense_replace all have experts; set it to 1 if that is right"),
}
_METHOD = "moelab has no other choice of this kind of model; set it if the weights were trained with it"
ONLY_V2 = {
    **_SAME,
    "scoring_func": (("softmax",), _METHOD),
    "topk_method": (("greedy", "group_limited_greedy"), _METHOD),
    "norm_topk_prob": ((False,), "transformers' model of this kind doesn't normalise; set it to false"),
}
ONLY_V3 = {**_SAME, "scoring_func": (("sigmoid",), _METHOD), "topk_method": (("noaux_tc",), _METHOD)}
# transformers' defaults, of what published config.json files may leave out.
SAID_V2 = {"max_position_embeddings": 2048}
SAID_V3 = {"max_position_embeddings": 4096}
LEFT_OUT = "layers that predict further tokens (multi-token prediction), which moelab's decoder has none of"


def complete_v2(config: ModelConfig, fields: Fields) -> None:
    """Softmax over all experts; within groups only where `topk_method` says so; weights not normalised."""
    grouped = fields.get("topk_method", "greedy") == "group_limited_greedy"
    router = {
        "name": "softmax_topk",
        "norm_topk_prob": False,
        "routed_scaling_factor": fields.number("routed_scaling_factor", float, 1.0),
        "n_group": fields.number("n_group", int, 1) if grouped else 1,
        "topk_group": fields.number("topk_group", int, 1) if grouped else 1,
        "group_score": "max",
    }
    _complete(config, fields, router, dense=0, interleaved=True)


def complete_v3(config: ModelConfig, fields: Fields) -> None:
    """Sigmoids, chosen with a bias, within groups scored by their best two."""
    router = {
        "name": "sigmoid_topk",
        "norm_topk_prob": fields.number("norm_topk_prob", bool, True),
        "routed_scaling_factor": fields.number("routed_scaling_factor", float, 2.5),
        "n_group": fields.number("n_group", int, 8),
        "topk_group": fields.number("topk_group", int, 4),
        "group_score": "top2",
    }
    _complete(config, fields, router, dense=3, interleaved=fields.number("rope_interleave", bool, True))


def parts(name: str, config: ModelConfig) -> list[Part]:
    """A stored tensor under our name; none of the layers that stand behind the decoder's own."""
    layer = _LAYER.match(name)
    if layer is not None and int(layer[1]) >= config.num_hidden_layers:
        return []
    name = name.replace(".mlp.shared_experts.", ".mlp.shared_expert.")
    return [Part(name.replace(".mlp.gate.e_score_correction_bias", ".mlp.router.bias"))]


def _complete(config: ModelConfig, fields: Fields, router: dict[str, Any], *, dense: int, interleaved: bool) -> None:
    """`dense`: first layers without experts, where config.json doesn't say."""
    rope = fields.number("qk_rope_head_dim", int)
    if config.head_dim not in (None, rope):  # transformers writes qk_rope_head_dim under this name
        fields.refuse("head_dim", f"of latent attention it is qk_rope_head_dim, {rope}: remove it")
    config.head_dim = None
    config.latent_attention = LatentAttentionConfig(
        kv_lora_rank=fields.number("kv_lora_rank", int),
        q_lora_rank=None if fields.is_null("q_lora_rank") else fields.number("q_lora_rank", int),
        qk_nope_head_dim=fields.number("qk_nope_head_dim", int),
        qk_rope_head_dim=rope,
        v_head_dim=fields.number("v_head_dim", int),
        rope_interleave=interleaved,
        attention_bias=fields.number("attention_bias", bool, False),
    )
    first = fields.number("first_k_dense_replace", int, dense)
    if first >= config.num_hidden_layers:  # to transformers too: every layer dense
        return
    width = fields.number("moe_intermediate_size", int)
    shared = None if fields.is_null("n_shared_experts") else fields.number("n_shared_experts", int)
    config.moe = MoEConfig(
        layout={
            "name": "first_dense",
            "num_experts": fields.number("n_routed_experts", int),
            "num_experts_per_tok": fields.number("num_experts_per_tok", int),
            "moe_intermediate_size": width,
            "first_k_dense_replace": first,
        },
        router=router,
        shared_expert={"name": "none"} if shared is None else {"name": "plain", "intermediate_size": width * shared},
        balance_losses=[],
    )
