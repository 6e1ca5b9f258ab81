"""Hugging Face tensor names by what they are, for upcycling; free of torch."""

from __future__ import annotations

EMBEDDING, LM_HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def layer(layer_id: int) -> str:
    return f"model.layers.{layer_id}"


def dense_ffn(layer_id: int, matrix: str) -> str:
    return f"{layer(layer_id)}.mlp.{matrix}_proj.weight"


def expert(layer_id: int, expert_id: int, matrix: str) -> str:
    return f"{layer(layer_id)}.mlp.experts.{expert_id}.{matrix}_proj.weight"


def shared(layer_id: int, matrix: str) -> str:
    return f"{layer(layer_id)}.mlp.shared_expert.{matrix}_proj.weight"


def shared_gate(layer_id: int) -> str:
    return f"{layer(layer_id)}.mlp.shared_expert_gate.weight"


def router(layer_id: int) -> str:
    return f"{layer(layer_id)}.mlp.gate.weight"


def router_norm(layer_id: int) -> str:
    """The norm whose output the router reads."""
    return f"{layer(layer_id)}.post_attention_layernorm.weight"


def attention(layer_id: int, *, qkv_bias: bool, use_qk_norm: bool) -> list[str]:
    """What a layer has besides its FFN."""
    prefix = f"{layer(layer_id)}.self_attn"
    kinds = ("weight", "bias") if qkv_bias else ("weight",)
    return [
        f"{layer(layer_id)}.input_layernorm.weight",
        *(f"{prefix}.{part}.{kind}" for part in ("q_proj", "k_proj", "v_proj") for kind in kinds),
        f"{prefix}.o_proj.weight",
        *(f"{prefix}.{part}.weight" for part in ("q_norm", "k_norm") if use_qk_norm),
        router_norm(layer_id),
    ]
