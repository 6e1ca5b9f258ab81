"""Second derivatives are right or refused: none is silently that of constants."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expert_routings import EXPERTS, TOP_K, bank, reference, skewed
from moelab import BackendContext, Registry
from moelab.hookspecs import ACTIVATIONS, EXPERT_BACKENDS
from moelab.kernels import onednn
from moelab.moe.activation import ActivationContext
from moelab.moe.layout import ExpertLayout
from moelab.nn.causal_attention import causal_attention
from moelab.nn.linear import _by_onednn
from moelab.nn.loss import logits_and_cross_entropy, token_cross_entropy
from moelab.nn.sinks import fused_causal

ROOT = Path(__file__).parents[3]
TARGETS = torch.tensor([[1, 4, 0]])
REGISTRY = Registry(entry_points=False)


def _pieces(joined: Tensor) -> Tensor:
    activation = REGISTRY.build(ACTIVATIONS, {"name": "clamped_swiglu"}, ActivationContext(4, 0, 1), "here")
    return activation.of_joined(joined)


def _experts(name: str, x: Tensor) -> Tensor:
    context = BackendContext(ExpertLayout(EXPERTS, TOP_K, 8), 16, 0, dict)
    backend = REGISTRY.build(EXPERT_BACKENDS, {"name": name}, context, "here")
    torch.manual_seed(1)
    return backend(x, skewed(), bank(dtype=x.dtype))


FIRST_ALONE: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "loss": (lambda x, head: token_cross_entropy(x, head, TARGETS), [(1, 3, 4), (5, 4)]),
    "loss, logits anew": (lambda x, head: token_cross_entropy(x, head, TARGETS, recompute=True), [(1, 3, 4), (5, 4)]),
    "loss and logits": (lambda x, head: logits_and_cross_entropy(x, head, TARGETS)[1], [(1, 3, 4), (5, 4)]),
    "attention in blocks": (causal_attention, [(1, 2, 9, 4)] * 3),
    "attention with sinks": (fused_causal, [(1, 2, 9, 4)] * 3 + [(2,)]),
    "experts at once": (lambda x: _experts("batched", x), [(40, 16)]),
    "clamped_swiglu": (_pieces, [(3, 2, 4)]),
}


@pytest.mark.parametrize("name", FIRST_ALONE)
def test_a_second_derivative_that_is_not_there_is_refused(name: str):
    """A loss's own gradient comes in without a history, and so do others', where only their inputs have one."""
    compute, shapes = FIRST_ALONE[name]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    y = compute(*inputs)
    with pytest.raises(NotImplementedError, match=r"_\w+\.backward: create_graph=True asks for a second derivative"):
        torch.autograd.grad(y.sum(), inputs, create_graph=True)
    assert all(each.isfinite().all() for each in torch.autograd.grad(compute(*inputs).sum(), inputs))


def _second(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of half the squared norm of the gradient of half the squared norm of y."""
    x = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(compute(x).square().sum() / 2, x, create_graph=True)
    return torch.autograd.grad(dx.square().sum() / 2, x)[0]


@pytest.mark.parametrize("name", ["loop", "grouped_mm"])
def test_second_derivatives_through_experts_are_those_of_float64(name: str):
    x = torch.randn(40, 16)

    def exact(wide: Tensor) -> Tensor:
        torch.manual_seed(1)
        routing = skewed()
        return reference(wide, routing, bank(dtype=x.dtype).double())

    torch.testing.assert_close(
        _second(lambda x: _experts(name, x), x).double(), _second(exact, x.double()), rtol=1e-3, atol=1e-4
    )


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("wholly", [True, False])
def test_second_derivatives_through_a_layer_by_onednn_are_those_of_float64(wholly: bool):
    x, weight, bias = torch.randn(6, 5), torch.randn(7, 5), torch.randn(7)
    grads = []
    for kind, compute in (
        (torch.float32, lambda *given: _by_onednn(*given, wholly=wholly)), (torch.float64, torch.nn.functional.linear)
    ):  # fmt: skip
        inputs = [each.to(kind).requires_grad_() for each in (x, weight, bias)]
        first = torch.autograd.grad(compute(*inputs).square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), inputs)
        grads.append([each.double() for each in second])
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-2)
    assert onednn.onednn_serves(x, weight, bias)


def test_every_written_backward_pass_refuses_second_derivatives_or_is_tested_for_them():
    tested = {"_Linear", "_RMSNorm", "_Gather", "_Combine"}
    found = set()
    for path in [*(ROOT / "core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        if "autograd.Function" not in path.read_text():
            continue
        for kind in (each for each in ast.walk(ast.parse(path.read_text())) if isinstance(each, ast.ClassDef)):
            if "torch.autograd.Function" in map(ast.unparse, kind.bases):
                backward = [each for each in kind.body if isinstance(each, ast.FunctionDef) and each.name == "backward"]
                if any("first_order" not in map(ast.unparse, each.decorator_list) for each in backward):
                    found.add(kind.name)
    assert found == tested
