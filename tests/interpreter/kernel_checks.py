"""Run by test_kernels.py with TRITON_INTERPRET=1: our own kernels on the CPU, in fp32."""

from __future__ import annotations

import pytest
import torch

from expert_routings import CASES, EXPERTS, TOP_K, bank, gradients, reference
from moelab import BackendContext, Registry
from moelab.hookspecs import EXPERT_BACKENDS
from moelab.kernels import rows as kernels
from moelab.kernels.choice import fused
from moelab.kernels.swiglu import joined_swiglu, swiglu
from moelab.moe.activation import SwiGLU
from moelab.moe.dispatch import dispatch_plan
from moelab.moe.layout import ExpertLayout


def test_here_the_kernels_are_what_runs() -> None:
    assert fused(torch.zeros(1))
    assert not fused(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("case", CASES)
def test_a_layer_equals_the_reference_in_output_and_every_gradient(case: str) -> None:
    routing, experts = CASES[case](), bank(48, 32, torch.float32)
    x = torch.randn(routing.num_tokens, 48, requires_grad=True)
    upstream = torch.randn(routing.num_tokens, 48)
    context = BackendContext(ExpertLayout(EXPERTS, TOP_K, 32), 48, 0, dict)
    backend = Registry(entry_points=False).build(EXPERT_BACKENDS, {"name": "grouped_mm"}, context, "here")
    inputs = [x, routing.weight, *experts.parameters()]
    found, wanted = backend(x, routing, experts), reference(x, routing, experts)
    for ours, theirs in zip(
        [found, *gradients(found, upstream, inputs)], [wanted, *gradients(wanted, upstream, inputs)], strict=True
    ):
        scale = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("width", [8, 1024, 1500])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_mixed_and_spread_as_in_float64(case: str, width: int) -> None:
    routing = CASES[case]()
    plan, count = dispatch_plan(routing), routing.expert.numel()
    rows, dy = torch.randn(count, width), torch.randn(routing.num_tokens, width)
    weight = routing.weight.detach()
    by_row = weight[plan.order].double()
    wanted = torch.zeros(routing.num_tokens, width, dtype=torch.float64)
    plain = wanted.index_add(0, plan.token, rows.double())
    wanted = wanted.index_add(0, plan.token, rows.double() * by_row[:, None])
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(kernels.mix(rows, plan.by_token, plan.starts, weight, plan.order), wanted, **close)
    torch.testing.assert_close(kernels.mix(rows, plan.by_token, plan.starts, None, None), plain, **close)
    grad_rows, grad_weight = kernels.spread(dy, rows, weight, plan.token, plan.order)
    spread = dy.double()[plan.token]
    torch.testing.assert_close(grad_rows, spread * by_row[:, None], **close)
    wanted = torch.empty(count, dtype=torch.float64)
    wanted[plan.order] = (spread * rows).sum(-1)
    torch.testing.assert_close(grad_weight, wanted, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("shape", [(0, 2, 8), (3, 2, 8), (5, 2, 1500)])
def test_swiglu_equals_float64_with_its_gradients(shape: tuple[int, int, int]) -> None:
    joined = (3 * torch.randn(shape)).requires_grad_()
    upstream = torch.randn(shape[0], shape[2])
    wide = joined.detach().double().requires_grad_()
    wanted = SwiGLU()(*wide.unbind(1))
    (gradient,) = torch.autograd.grad(wanted, wide, upstream.double())
    for found in (joined_swiglu(joined), swiglu(*joined.unbind(1))):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, check_dtype=False)
        (ours,) = torch.autograd.grad(found, joined, upstream)
        torch.testing.assert_close(ours, gradient, rtol=1e-5, atol=1e-5, check_dtype=False)
