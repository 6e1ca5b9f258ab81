"""The linear layer's own path for large fp32 products, beside torch's in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelab.nn import linear as module
from moelab.nn.linear import Linear, prefers_onednn


def _layer(monkeypatch: pytest.MonkeyPatch, bias: bool) -> tuple[Linear, Tensor]:
    """Every size counts as large."""
    monkeypatch.setattr(module, "LEAST_FLOPS", 0)
    torch.manual_seed(0)
    return Linear(24, 40, bias=bias), torch.randn(3, 5, 24, requires_grad=True)


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_nn_linear_in_float64(bias: bool, monkeypatch: pytest.MonkeyPatch):
    layer, x = _layer(monkeypatch, bias)
    assert prefers_onednn(x, 40)
    y = layer(x)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    assert not prefers_onednn(x.double(), 40)
    wide = Linear(24, 40, bias=bias).double()
    wide.load_state_dict(layer.state_dict())
    wanted_y = wide(x.double())
    wanted = torch.autograd.grad(wanted_y, [x, *wide.parameters()], upstream.double())
    for mine, theirs in zip([y, *found], [wanted_y, *wanted], strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_gets_no_gradient(monkeypatch: pytest.MonkeyPatch):
    layer, x = _layer(monkeypatch, True)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((40,), 15.0))
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))


def test_autocast_and_other_devices_are_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    layer, x = _layer(monkeypatch, False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not prefers_onednn(x, 40)
        assert layer(x).dtype == torch.bfloat16
    assert not prefers_onednn(x.to("meta"), 40)


def test_small_products_are_left_to_torch():
    assert not prefers_onednn(torch.empty(16, 64), 64)
    assert prefers_onednn(torch.empty(4096, 256), 512)
