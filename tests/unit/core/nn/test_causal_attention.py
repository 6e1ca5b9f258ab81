"""Blocked causal attention beside its definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelab.nn import causal_attention as module
from moelab.nn.causal_attention import blocks_pay, causal_attention
from moelab.nn.full_attention import fastest as attend
from moelab.nn.full_attention import torch_attention

SHAPES = [(2, 4, 2, 200, 16), (3, 4, 4, 130, 8), (1, 6, 1, 64, 32), (5, 2, 2, 1, 8)]  # B, H, G, S, d


def _inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    batch, heads, groups, seq, width = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, groups, groups, heads)  # q, k, v and the gradient of the output, as the projections lay them out
    made = [torch.randn(batch, seq, n, width, generator=generator).to(dtype).transpose(1, 2) for n in sizes]
    return [tensor.requires_grad_() for tensor in made[:3]] + made[3:]


def _defined(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) where key <= query) v in float64."""
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.double().repeat_interleave(shared, 1) for tensor in (key, value))
    scores = query.double() @ key.transpose(2, 3) * query.shape[3] ** -0.5
    allowed = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value


def _with_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    *leaves, upstream = inputs
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@pytest.mark.parametrize("keep", [0, 1 << 24], ids=["recomputed", "kept"])
@pytest.mark.parametrize("together", [1, 1 << 19], ids=["one sequence", "many sequences"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_are_those_of_the_definition(shape, together, keep, monkeypatch):
    monkeypatch.setattr(module, "KEEP_ELEMENTS", keep)
    monkeypatch.setattr(module, "BATCH_ELEMENTS", together)
    inputs = _inputs(shape)
    for found, wanted in zip(_with_gradients(causal_attention, inputs), _with_gradients(_defined, inputs), strict=True):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=5e-6)


def test_half_width_inputs_are_computed_in_fp32():
    """Only inputs and outputs are rounded: within one rounding of the definition, where bf16 scores would be 8 off."""
    inputs = _inputs((2, 4, 2, 200, 64), torch.bfloat16)
    found, wanted = causal_attention(*inputs[:3]), _defined(*inputs[:3])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted.bfloat16().double(), rtol=2**-7, atol=1e-6)


def test_autocast_does_not_reach_the_products():
    inputs = _inputs((2, 4, 2, 200, 16))
    with torch.autocast("cpu", torch.bfloat16):
        out = causal_attention(*inputs[:3])
    out.backward(inputs[3])
    torch.testing.assert_close(out.double(), _defined(*inputs[:3]), rtol=1e-5, atol=5e-6)


def test_a_second_backward_pass_gives_the_same_gradients():
    """Gradient shares of balance losses go through the graph several times."""
    *leaves, upstream = _inputs((2, 4, 2, 200, 16))
    out = causal_attention(*leaves)
    first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(out, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_middling_sizes_without_padding_are_computed_in_blocks():
    query = torch.empty(8, 4, 512, 64)
    assert blocks_pay(query)
    assert not blocks_pay(query[:, :, :64])  # too little
    assert blocks_pay(torch.empty(2, 4, 1024, 64))
    assert not blocks_pay(torch.empty(2, 4, 1025, 64))
    assert blocks_pay(torch.empty(2, 4, 768, 64, dtype=torch.bfloat16))
    assert not blocks_pay(torch.empty(2, 4, 769, 64, dtype=torch.bfloat16))  # torch's kernel is fast there
    assert not blocks_pay(query.to("meta"))


def test_a_mask_goes_to_torchs_kernel():
    query, key, value, _ = _inputs((2, 8, 2, 256, 16))
    mask = torch.ones(2, 1, 256, 256, dtype=torch.bool).tril()
    mask[1, :, :, :5] = torch.eye(256, dtype=torch.bool)[:, :5]  # padding sees itself
    torch.testing.assert_close(attend(query, key, value, mask), torch_attention(query, key, value, mask))
    assert blocks_pay(query)
    torch.testing.assert_close(attend(query, key, value, None)[0], attend(query, key, value, mask)[0])
