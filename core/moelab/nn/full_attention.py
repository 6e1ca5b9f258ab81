"""Attention to every earlier position of the same document: the default, by what measures fastest."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from moelab.nn.attention_inputs import Attend, AttentionInputs
from moelab.nn.blocked_attention import LEAST_ROWS, View
from moelab.nn.causal_attention import blocks_pay, can_choose, causal_attention
from moelab.nn.fused_parts import fused_pays
from moelab.nn.masked_attention import masked_attention
from moelab.nn.rope import rotate
from moelab.nn.sinks import all_pairs, fused_causal
from moelab.ways import choose, trial

BLOCKS, TORCH = "blocks", "torch"
ROTATED = "keys turned by their own positions"  # cache_mode
LARGEST_MASK = 1 << 22  # elements of S x L; beyond, what needs a mask is computed in blocks


class FullAttention:
    """softmax(q k^T / sqrt(d)) v over the keys up to the query, each turned by its position (Su et al. 2021)."""

    cache_mode = ROTATED
    reach = None
    serves_sinks = True

    def __init__(self, layer_id: int, attend: Attend | None = None) -> None:
        """`attend`: what computes plain causal attention; None: what measures fastest."""
        self.layer_id = layer_id
        self.attend = attend or fastest

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        return self.on_turned(*turned(self.layer_id, query, key, value, inputs), inputs)

    def on_turned(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        """As `TurnedKernel`."""
        if inputs.attend is not None:
            return inputs.attend(query, key, value, inputs.mask, inputs.sinks)
        if inputs.given_mask is None and (inputs.look is not None or _in_blocks(query, inputs)):
            view = inputs.once("full", lambda: View.of(inputs))
            return masked_attention([query], key, value, view, inputs.look_of(self.layer_id), inputs.sinks)
        return self.attend(query, key, value, inputs.mask, inputs.sinks)


def turned(
    layer_id: int, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs
) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key turned by their positions; of key and value those of the cache too: [B, G, L, d]."""
    cos, sin = inputs.rotation()
    query = rotate(query, cos.to(query.dtype), sin.to(query.dtype))
    key = rotate(key, cos.to(key.dtype), sin.to(key.dtype))
    if inputs.cache is not None:
        key, value = inputs.cache.append(layer_id, key, value)
    return query, key, value


def _in_blocks(query: Tensor, inputs: AttentionInputs) -> bool:
    """Whether a mask is needed that would be large, or that leaves most out; beside sinks all that is not small."""
    if inputs.documents is not None and inputs.several_documents:
        return True
    masked = inputs.padding is not None or inputs.past > 0
    if inputs.sinks is not None:
        return query.shape[2] > LEAST_ROWS and (masked or not (blocks_pay(query) or fused_pays(query)))
    return inputs.documents is None and masked and inputs.positions.shape[1] * inputs.length > LARGEST_MASK


def fastest(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None = None) -> Tensor:
    """query [B, H, S, d], key [B, G, L, d], value [B, G, L, v], sinks [H] -> [B, H, S, v], by what measures fastest."""
    if mask is None and _way(query, key, value, sinks) == BLOCKS:
        return causal_attention(query, key, value, sinks)
    return torch_attention(query, key, value, mask, sinks)


def _way(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> str:
    """By blocks or by torch's kernel, without a mask: as constants say, or as the run has measured its own sizes."""
    usual = BLOCKS if blocks_pay(query) else TORCH
    if sinks is not None or not can_choose(query):
        return usual
    (batch, heads, seq, width), groups, dtype = query.shape, key.shape[1], str(query.dtype).removeprefix("torch.")
    return choose(
        lambda: f"attention {batch} x {heads}/{groups} heads x {seq} x {width}/{value.shape[-1]} {dtype}",
        usual,
        lambda: {
            BLOCKS: trial(causal_attention, query, key, value),
            TORCH: trial(partial(torch_attention, mask=None), query, key, value),
        },
    )


def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None = None
) -> Tensor:
    """`fastest` by torch's own kernel; mask as `AttentionInputs.mask`.

    Its fused kernels want one width; at 2048 positions a CPU's took 0.4 of the time of products of S x S, which is what
    torch falls back to otherwise (benchmarks/latent_attention.py).
    """
    if sinks is not None:
        return (
            fused_causal(query, key, value, sinks)
            if mask is None and fused_pays(query)
            else all_pairs(query, key, value, mask, sinks)
        )
    width, wanted = query.shape[-1], value.shape[-1]
    if wanted != width:
        query, key, value = (_widened(each, max(width, wanted)) for each in (query, key, value))
    batch, heads, seq, _ = query.shape
    groups = key.shape[1]
    if seq == 1 and heads > groups and mask is not None:  # heads as if they were positions: no key is read twice
        query = query.reshape(batch, groups, heads // groups, -1)
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=query.shape[1] > groups,
        scale=None if wanted == width else width**-0.5,
    )  # fmt: skip
    return out.reshape(batch, heads, seq, -1)[..., :wanted]


def _widened(x: Tensor, width: int) -> Tensor:
    """[..., d] -> [..., width], with zeros behind."""
    return x if x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))
