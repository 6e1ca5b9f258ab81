"""The linear layer's own path for large fp32 products, beside torch's in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.flop_counter import FlopCounterMode

from moelab.kernels import onednn
from moelab.kernels.onednn import prefers_onednn
from moelab.nn.linear import Linear
from moelab.nn.norm import RMSNorm


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


class _Halved(Tensor):
    """As a quantized weight is: a subclass that says itself what a linear layer makes of it, and nothing else."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs or {})
        x, weight, bias = args
        return nn.functional.linear(x, weight.as_subclass(Tensor) / 2, bias)


def _halved(layer: nn.Module, x: Tensor) -> object:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(_Halved), requires_grad=False)
    return layer(x)


def _tangent(layer: nn.Module, x: Tensor) -> object:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.cos()))).tangent


def _flops(layer: nn.Module, x: Tensor) -> object:
    with FlopCounterMode(display=False) as counter:
        layer(x)
    return torch.tensor(counter.get_total_flops())


def _sparse(layer: nn.Module, x: Tensor) -> object:
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)
    return layer(x)


FOLLOWED: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "vmap": lambda layer, x: torch.func.vmap(layer)(x),
    "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).square().sum())(x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x.cos(),))[1],
    "forward-mode derivatives": _tangent,
    "jit.trace": lambda layer, x: torch.jit.trace(layer, (x,))(x),
    "compile": lambda layer, x: torch.compile(layer, backend="eager", fullgraph=True)(x),
    "a counter of FLOPs": _flops,
    "a subclass": _halved,
    "sparse": _sparse,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_any_processor")
@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("name", FOLLOWED)
def test_what_follows_torchs_operations_sees_them(name: str, with_grad: bool):
    """oneDNN's product has no derivatives, no batched form, no count and no other kinds of weight."""
    found = []
    x = torch.randn(16, 3, 256)
    for kind in (Linear, nn.Linear):
        torch.manual_seed(1)
        layer = kind(256, 160)
        with torch.set_grad_enabled(with_grad):
            found.append(FOLLOWED[name](layer, x))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.usefixtures("_any_processor")
@pytest.mark.parametrize("kind", [lambda: Linear(24, 40), lambda: RMSNorm(24, 1e-6)])
def test_a_parametrized_weight_is_computed_once_a_pass(kind: Callable[[], nn.Module]):
    """Another time would draw other masks, or move a spectral norm's iteration on."""
    looks: list[int] = []

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            looks.append(1)
            return weight * 2

    layer = kind()
    register_parametrization(layer, "weight", Counted())
    looks.clear()
    layer(torch.randn(3, 5, 24)).sum().backward()
    assert len(looks) == 1
