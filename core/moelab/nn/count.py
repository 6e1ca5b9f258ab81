"""Parameters and FLOPs of a built model, on the meta device too, whatever plugins it is made of.

D hidden size, E experts, K experts per token, H heads, S sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from moelab.moe.block import MoEBlock
from moelab.nn.transformer import DecoderLayer, Transformer

BACKWARD = 2  # the backward pass of a matmul is two of its size: for the input and for the weight


@dataclass(frozen=True)
class Parameters:
    """Counts; a tied head and embedding count once."""

    total: int
    active: int  # all that one token passes through: total minus the routed experts it does not choose
    embedding: int  # input table and head
    non_embedding: int  # total - embedding
    active_non_embedding: int  # active - embedding
    routed: int  # all experts' weights


def count_parameters(model: Transformer) -> Parameters:
    """active = total - sum over MoE layers of routed * (E - K) / E."""
    stored = sum(parameter.numel() for parameter in model.parameters())  # torch yields a shared one once
    banks = [(_size(block), block.layout) for block in _blocks(model)]
    padding = sum(parameter.numel() for b in _blocks(model) for parameter in b.experts.parameters())
    total = stored - (padding - sum(size for size, _ in banks))  # zero neurons that even out widths are no parameters
    idle = sum(size - size * layout.num_experts_per_tok // layout.num_experts for size, layout in banks)
    tables = {id(weight): weight.numel() for weight in (model.embed_tokens.weight, model.lm_head.weight)}
    embedding = sum(tables.values())
    return Parameters(
        total=total,
        active=total - idle,
        embedding=embedding,
        non_embedding=total - embedding,
        active_non_embedding=total - idle - embedding,
        routed=sum(size for size, _ in banks),
    )


def flops_per_token(model: Transformer, sequence_length: int) -> float:
    """Training: forward and backward, 3 x forward. What activation checkpointing computes again is not counted."""
    return (1 + BACKWARD) * forward_flops_per_token(model, sequence_length)


def forward_flops_per_token(model: Transformer, sequence_length: int) -> float:
    """2 * (matmul weights that a token passes through) + sum over layers of 2 * S * H * head_dim.

    Weights: q, k, v, o; the dense FFN; or router, K experts and the shared expert with its gate; and the head,
    tied or not. The embedding is a lookup. Attention is two products (q k^T and p v) of 2 * head_dim FLOPs a head
    and key; a causal token sees S / 2 keys on average, half the square. Norms, RoPE, softmax and biases are left
    out, as PaLM (2204.02311, appendix B) does; PaLM counts the whole square.
    """
    layers = sum(layer_forward_flops(layer, sequence_length) for layer in model.layers)
    return 2.0 * model.lm_head.weight.numel() + layers


def layer_forward_flops(layer: nn.Module, sequence_length: int) -> float:
    """One decoder layer's part of `forward_flops_per_token`."""
    assert isinstance(layer, DecoderLayer)
    weights = _matmul_weights(layer.self_attn) + _mlp_weights(layer.mlp)
    width = layer.self_attn.o_proj.in_features  # H * head_dim
    return float(2 * weights + 2 * sequence_length * width)


def layer_parameters(layer: nn.Module) -> tuple[int, int]:
    """(all, active) parameters of one decoder layer."""
    assert isinstance(layer, DecoderLayer)
    stored = sum(parameter.numel() for parameter in layer.parameters())
    if not isinstance(layer.mlp, MoEBlock):
        return stored, stored
    layout, routed = layer.mlp.layout, _size(layer.mlp)
    total = stored - sum(parameter.numel() for parameter in layer.mlp.experts.parameters()) + routed
    return total, total - (routed - routed * layout.num_experts_per_tok // layout.num_experts)


def _mlp_weights(mlp: nn.Module) -> int:
    if not isinstance(mlp, MoEBlock):
        return _matmul_weights(mlp)
    layout = mlp.layout
    chosen = _size(mlp) * layout.num_experts_per_tok // layout.num_experts
    beside = [part for part in (mlp.router, mlp.shared_expert) if isinstance(part, nn.Module)]
    return chosen + sum(_matmul_weights(part) for part in beside)


def _matmul_weights(module: nn.Module) -> int:
    """Matrices, but for lookup tables; vectors are biases and norms."""
    return sum(
        parameter.numel()
        for owner in module.modules()
        if not isinstance(owner, nn.Embedding)
        for parameter in owner.parameters(recurse=False)
        if parameter.ndim > 1
    )


def _blocks(model: Transformer) -> Iterator[MoEBlock]:
    return (layer.mlp for layer in model.layers if isinstance(layer.mlp, MoEBlock))


def _size(block: MoEBlock) -> int:
    """Weights of all experts of a layer: gate, up and down of each neuron."""
    return 3 * block.layout.total_width * block.experts.down.shape[-1]
