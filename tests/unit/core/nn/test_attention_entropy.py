"""Attention's entropy: closed forms where all keys weigh the same, all pairs in float64 elsewhere, and only blocks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import moelab
from moelab import testing
from moelab.config.model import ModelConfig
from moelab.hookspecs import ATTENTIONS
from moelab.nn.attention_entropy import AttentionEntropy, attention_entropy

REGISTRY = moelab.Registry(entry_points=False)
SEQ = 48
PARTS: dict[str, tuple[dict[str, object], Callable[[int], int]]] = {
    "full": ({}, lambda before: before + 1),
    "sliding_window": ({"window": 11}, lambda before: min(before + 1, 11)),
    "dual_chunk": ({"preset": None, "chunk": 7, "local": 3, "max_position": 12}, lambda before: before + 1),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("document", [SEQ, 17])
def test_queries_of_zeros_have_the_logarithm_of_what_they_see(name: str, document: int) -> None:
    options, visible = PARTS[name]
    case = testing.AttentionCase(REGISTRY.components(ATTENTIONS)[name], options)
    query, key, value = case.heads(SEQ, dtype=torch.float64)
    entropy = AttentionEntropy(SEQ)
    documents = None if document == SEQ else (torch.arange(SEQ) // document)[None]
    case.build()(0 * query, key, value, case.inputs((query, key, value), look=entropy, documents=documents))
    expected = torch.tensor([math.log(visible(i % document)) for i in range(SEQ)], dtype=torch.float64)
    torch.testing.assert_close(entropy.mean()[0], expected, rtol=0, atol=1e-12)


def test_it_is_that_of_all_pairs_in_float64() -> None:
    case = testing.AttentionCase(REGISTRY.components(ATTENTIONS)["full"])
    heads = case.heads(SEQ, dtype=torch.float64)
    inputs = case.inputs(heads, look=(entropy := AttentionEntropy(SEQ)))
    case.build()(*heads, inputs)
    cos, sin = inputs.rotation()
    query, key = (moelab.nn.rope.rotate(one, cos, sin) for one in heads[:2])  # type: ignore[attr-defined]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(torch.ones(SEQ, SEQ).triu(1).bool(), -math.inf).softmax(-1)
    expected = -(weights * weights.clamp(min=1e-300).log()).sum(-1).mean((0, 1))
    torch.testing.assert_close(entropy.mean()[0], expected, rtol=0, atol=1e-12)


def test_no_more_than_a_block_is_shown_at_once() -> None:
    """Every query of every head once, and never a large part of S x S."""
    case = testing.AttentionCase(REGISTRY.components(ATTENTIONS)["full"])
    seq, shown = 4096, []
    rows = torch.zeros(seq, dtype=torch.int64)

    def look(layer: int, batch: slice, at: slice, weights: Tensor) -> None:
        shown.append(weights.numel())
        rows[at] += weights.shape[0] * weights.shape[1]

    heads = case.heads(seq, batch=1)
    case.build()(*heads, case.inputs(heads, look=look))
    count = heads[0].shape[1]
    assert rows.unique().tolist() == [count]
    assert 16 * max(shown) <= count * seq * seq


def test_of_a_model_every_layer_is_looked_at_and_its_output_is_the_same() -> None:
    config = ModelConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = moelab.build_model(config, REGISTRY, seed=0).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.q_proj.bias.zero_()
    ids = torch.randint(0, 32, (3, 40), generator=torch.Generator().manual_seed(0))
    found = attention_entropy(model, ids)
    assert list(found) == [0, 1]
    expected = torch.arange(1, 41, dtype=torch.float64).log()
    for values in found.values():
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
