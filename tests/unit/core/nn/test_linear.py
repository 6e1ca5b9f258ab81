"""The linear layer's own path for large fp32 products, beside torch's in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelab.kernels import onednn
from moelab.kernels.onednn import prefers_onednn
from moelab.nn.linear import Linear


@pytest.fixture(params=["zen_4", "zen_5"])
def _any_processor(request: pytest.FixtureRequest) -> None:
    """Every size counts as large, on either kind."""
    request.getfixturevalue(request.param)
    monkeypatch = request.getfixturevalue("monkeypatch")
    monkeypatch.setattr(onednn, "LEAST_FLOPS", 0)
    monkeypatch.setattr(onednn, "LEAST_FLOPS_WIDER", 0)


def _layer(bias: bool) -> tuple[Linear, Tensor]:
    return Linear(24, 40, bias=bias), torch.randn(3, 5, 24, requires_grad=True)


@pytest.mark.usefixtures("_any_processor")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(24, 40), (40, 24)])
def test_output_and_gradients_are_those_of_nn_linear_in_float64(bias: bool, sizes: tuple[int, int]):
    layer, x = Linear(*sizes, bias=bias), torch.randn(3, 5, sizes[0], requires_grad=True)
    assert prefers_onednn(x, layer.weight)
    y = layer(x)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    wide = Linear(*sizes, bias=bias).double()
    wide.load_state_dict(layer.state_dict())
    wanted_y = wide(x.double())
    wanted = torch.autograd.grad(wanted_y, [x, *wide.parameters()], upstream.double())
    for mine, theirs in zip([y, *found], [wanted_y, *wanted], strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-5)
    assert all(each.is_contiguous() for each in found)


@pytest.mark.usefixtures("_any_processor")
def test_a_frozen_weight_gets_no_gradient():
    layer, x = _layer(True)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((40,), 15.0))
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))


@pytest.mark.usefixtures("_any_processor")
def test_autocast_and_other_devices_are_left_to_torch():
    layer, x = _layer(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not prefers_onednn(x, layer.weight)
        assert layer(x).dtype == torch.bfloat16
    assert not prefers_onednn(x.to("meta"), layer.weight)
