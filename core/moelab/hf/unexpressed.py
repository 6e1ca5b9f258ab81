"""Kinds of models with experts that are known by name and can't be read, and why: what this decoder has no parts for.

After transformers 5.23, models/*/modeling_*.py. Their experts can be expressed; recipes of configs/moe/ have some.
"""

from __future__ import annotations

from collections.abc import Mapping

UNEXPRESSED: Mapping[str, tuple[str, ...]] = {
    "kimi_linear": ("Kimi Delta Attention",),
    "longcat_flash": ("two attentions and two dense networks beside the experts of a layer",),
    "qwen3_next": ("gated DeltaNet layers", "a gate on the attention's output", "rotary embedding of a part of a head"),
    "llama4_text": ("layers without rotary embedding", "attention in chunks", "weights that scale the experts' input"),
    "nemotron_h": ("Mamba-2 blocks", "blocks of attention alone, of experts alone"),
    "olmoe": ("norms over all heads of q and k together",),
    "glm4_moe": ("rotary embedding of a part of a head",),
    "granitemoe": ("scaled embeddings, residuals and logits",),
    "phimoe": ("LayerNorm", "SparseMixer's choice of experts"),
    "switch_transformers": ("an encoder", "relative positions added to the attention"),
}  # fmt: skip
