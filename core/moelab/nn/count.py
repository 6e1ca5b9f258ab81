"""Parameters and FLOPs of a built model, on the meta device too, whatever plugins it is made of.

Two counts of the routed experts: what the routers declare (`Router.expected_assignments`), known from the config,
and what a run served, counted from its records (`served_costs`). Everything else a token passes through either way.
D hidden size, E experts, F expert width, K experts per token, H heads, S sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from moelab.errors import ConfigError
from moelab.moe.activation import num_inputs, num_matrices
from moelab.moe.block import MoEBlock
from moelab.moe.contracts import ExpectedAssignments
from moelab.nn.transformer import DecoderLayer, Transformer

BACKWARD = 2  # the backward pass of a matmul is two of its size: for the input and for the weight
FLOPS_PER_WEIGHT = 2 * (1 + BACKWARD)  # of training: a multiplication and an addition, forward and backward


@dataclass(frozen=True)
class Parameters:
    """Counts; a tied head and embedding count once."""

    total: int
    active: int  # all that one token passes through, as declared: total minus what is not expected to serve it
    embedding: int  # input table and head
    non_embedding: int  # total - embedding
    active_non_embedding: int  # active - embedding
    routed: int  # all experts' weights


@dataclass(frozen=True)
class ServedCosts:
    """What training costs by what was served: so much for each token, so much for each assignment."""

    token_flops: int  # forward and backward, of all that every token passes through: everything but its own experts
    token_parameters: int  # that every token passes through
    expert_weights: tuple[int, ...]  # 3 D F (2 D F without a gate) of each expert, layer after layer: [sum of E]

    def weights(self, served: Sequence[int]) -> int:
        """served [sum of E], assignments to each expert -> weights multiplied with a token, summed over assignments."""
        return sum(count * weights for count, weights in zip(served, self.expert_weights, strict=True))

    def flops(self, tokens: int, weights: int) -> int:
        """Forward and backward, of `tokens` tokens whose assignments met `weights` expert weights in all."""
        return tokens * self.token_flops + FLOPS_PER_WEIGHT * weights

    def active_parameters(self, tokens: int, weights: int) -> float:
        """That a token passed through, on average; a token served twice by a layer passes through both experts."""
        return self.token_parameters + weights / max(tokens, 1)


def served_costs(model: Transformer, sequence_length: int) -> ServedCosts:
    """The costs by which a run's served assignments are counted; widths count expert by expert.

    Zero neurons that even out widths, padding rows, placeholders of weight 0, and whatever is computed twice
    (activation checkpointing, chunks, the routing pass of losses that need a whole batch's counts) are work of the
    machine, not of the model.
    """
    parameters = count_parameters(model)
    forward = sum(_layer_token_flops(layer, sequence_length) for layer in model.layers)
    forward += 2 * model.lm_head.weight.numel()
    weights = [each for block in moe_blocks(model) for each in _expert_weights(block)]
    flops = (1 + BACKWARD) * forward + sum(_idle_flops(block) for block in moe_blocks(model))
    return ServedCosts(flops, parameters.total - parameters.routed, tuple(weights))


def expected_assignments(block: MoEBlock) -> ExpectedAssignments:
    """What the layer's router declares, else the layout's K. Raises ConfigError for a declaration that can't be."""
    declared = getattr(block.router, "expected_assignments", None)
    if declared is None:
        return ExpectedAssignments(block.layout.num_experts_per_tok, "num_experts_per_tok of the layout")
    experts = block.layout.num_experts
    if not isinstance(declared, ExpectedAssignments) or not 0 <= declared.per_token <= experts:
        kind = type(block.router)
        raise ConfigError(
            f"model.moe.router, layer {block.layer_id}: {kind.__name__} of {kind.__module__} declares "
            f"expected_assignments {declared!r}; it must be ExpectedAssignments with per_token in 0 .. {experts}"
        )
    return declared


def count_parameters(model: Transformer) -> Parameters:
    """active = total - sum over MoE layers of routed * (E - A) / E, A the declared assignments per token."""
    stored = sum(parameter.numel() for parameter in model.parameters())  # torch yields a shared one once
    routed = sum(_routed_parameters(block) for block in moe_blocks(model))
    padding = sum(parameter.numel() for b in moe_blocks(model) for parameter in b.experts.parameters())
    total = stored - (padding - routed)  # zero neurons that even out widths are no parameters
    idle = sum(_idle_parameters(block) for block in moe_blocks(model))
    tables = {id(weight): weight.numel() for weight in (model.embed_tokens.weight, model.lm_head.weight)}
    embedding = sum(tables.values())
    return Parameters(
        total=total,
        active=total - idle,
        embedding=embedding,
        non_embedding=total - embedding,
        active_non_embedding=total - idle - embedding,
        routed=routed,
    )


def flops_per_token(model: Transformer, sequence_length: int) -> float:
    """Training, as declared: forward and backward, 3 x forward. What checkpointing computes again is not counted."""
    idle = sum(_idle_flops(block) for block in moe_blocks(model))
    return (1 + BACKWARD) * forward_flops_per_token(model, sequence_length) + idle


def forward_flops_per_token(model: Transformer, sequence_length: int) -> float:
    """2 * (matmul weights that a token passes through) + sum over layers of S * H * (d_qk + d_v).

    Weights: q, k, v, o, or latent attention's; the dense FFN; or router, the experts declared to serve a token with the
    projections to their latent space and back, and the shared expert with its gate; and the head, tied or not. The
    embedding is a lookup.
    Attention is two products (q k^T and p v) of 2 d_qk and 2 d_v FLOPs a head and key, both 2 * head_dim but in latent
    attention; a causal token sees S / 2 keys on average, half the square. Norms, RoPE, softmax, activations and biases
    are left out, as PaLM (2204.02311, appendix B) does; PaLM counts the whole square.
    """
    layers = sum(layer_forward_flops(layer, sequence_length) for layer in model.layers)
    return 2.0 * model.lm_head.weight.numel() + layers


def layer_forward_flops(layer: nn.Module, sequence_length: int) -> float:
    """One decoder layer's part of `forward_flops_per_token`."""
    assert isinstance(layer, DecoderLayer)
    routed = _declared_weights(layer.mlp) if isinstance(layer.mlp, MoEBlock) else 0
    return float(_layer_token_flops(layer, sequence_length) + 2 * routed)


def cached_numbers(model: Transformer) -> int:
    """Numbers that generation keeps of each token, of all layers: keys and values, or latent attention's vectors."""
    return sum(layer.self_attn.cached_numbers for layer in model.layers if isinstance(layer, DecoderLayer))


def layer_parameters(layer: nn.Module) -> tuple[int, int]:
    """(all, active as declared) parameters of one decoder layer."""
    assert isinstance(layer, DecoderLayer)
    stored = sum(parameter.numel() for parameter in layer.parameters())
    if not isinstance(layer.mlp, MoEBlock):
        return stored, stored
    routed = _routed_parameters(layer.mlp)
    total = stored - sum(parameter.numel() for parameter in layer.mlp.experts.parameters()) + routed
    return total, total - _idle_parameters(layer.mlp)


def moe_blocks(model: Transformer) -> Iterator[MoEBlock]:
    """The sparse layers' blocks, in order: that of the records."""
    return (layer.mlp for layer in model.layers if isinstance(layer.mlp, MoEBlock))


def _layer_token_flops(layer: nn.Module, sequence_length: int) -> int:
    """Forward, of what every token passes through in this layer: all but its routed experts."""
    assert isinstance(layer, DecoderLayer)
    mlp = layer.mlp
    parts = (mlp.router, mlp.shared_expert, mlp.latent) if isinstance(mlp, MoEBlock) else (mlp,)
    weights = sum(_matmul_weights(part) for part in (layer.self_attn, *parts) if isinstance(part, nn.Module))
    return 2 * weights + sequence_length * layer.self_attn.key_products  # of S / 2 keys, 2 FLOPs each


def _matmul_weights(module: nn.Module) -> int:
    """Matrices, but for lookup tables; vectors are biases and norms."""
    return sum(
        parameter.numel()
        for owner in module.modules()
        if not isinstance(owner, nn.Embedding)
        for parameter in owner.parameters(recurse=False)
        if parameter.ndim > 1
    )


def _declared_weights(block: MoEBlock) -> int:
    """Expert weights that a token is declared to pass through; at balance where the experts' widths differ."""
    return round(_size(block) * expected_assignments(block).per_token / block.layout.num_experts)


def _idle_flops(block: MoEBlock) -> int:
    """Of training, forward alone: experts that a backend computes for tokens that they don't serve, as declared."""
    return 2 * (_size(block) - _declared_weights(block)) if block.computes_every_expert else 0


def _size(block: MoEBlock) -> int:
    """Weights of all experts of a layer: gate, up and down of each neuron; biases are none."""
    return sum(_expert_weights(block))


def _expert_weights(block: MoEBlock) -> list[int]:
    each = num_matrices(block.experts.activation) * block.experts.hidden_size
    return [each * width for width in _widths(block)]


def _widths(block: MoEBlock) -> Sequence[int]:
    layout = block.layout
    return layout.expert_widths or [layout.moe_intermediate_size] * layout.num_experts


def _routed_parameters(block: MoEBlock) -> int:
    """All of a layer's experts: their weights, and the biases of each neuron and each output."""
    bank = block.experts
    if bank.down_bias is None:
        return _size(block)
    return _size(block) + num_inputs(bank.activation) * sum(_widths(block)) + bank.down_bias.numel()


def _idle_parameters(block: MoEBlock) -> int:
    """Those that are not expected to serve a token; at balance where the experts' widths differ."""
    routed, experts = _routed_parameters(block), block.layout.num_experts
    return routed - round(routed * expected_assignments(block).per_token / experts)
