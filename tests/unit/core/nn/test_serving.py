"""What parts offer for generation is what they are in a forward pass, and nobody who looks on is passed over."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moelab
from moelab import MoEContext
from moelab.config.model import ModelConfig, MoEConfig
from moelab.moe import thin_product
from moelab.moe.activation import ActivationContext
from moelab.moe.routing import Routing, TokenInfo
from moelab.nn.generate import generate_batch
from moelab.nn.linear import Linear
from moelab.nn.mlp import MLP
from moelab.nn.sampling import Sampling
from moelab_plugins.activations.relu2 import ReLU2, ReLU2Options
from moelab_plugins.routers.sigmoid_topk import SigmoidTopK, SigmoidTopKOptions
from moelab_plugins.routers.softmax_topk import SoftmaxTopK, SoftmaxTopKOptions
from moelab_plugins.shared_experts.gated import GatedOptions, GatedSharedExpert

ROWS = 5
CONTEXT = MoEContext(16, 6, 2, 24, 32, 0, 1, 64)


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are made of these sizes, and on any processor."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("oneDNN packs them")
    monkeypatch.setattr(thin_product, "reads_matrices_faster", lambda: True)
    monkeypatch.setattr(thin_product, "LEAST_ELEMENTS", 1)


def _copies(*parts: nn.Module, rows: int = ROWS) -> thin_product.PackedWeights:
    """Of what reads the input together, and of each other matrix alone; zeros in the originals tell who is read."""
    together = tuple(weight for part in parts for weight in part.reading_input())  # type: ignore[operator]
    known = set(map(id, together))
    alone = [(module.weight,) for part in parts for module in part.modules()
             if type(module) is Linear and id(module.weight) not in known]  # fmt: skip
    return thin_product.PackedWeights([together, *alone], 1 << 20, rows)


def _info(rows: int = ROWS) -> TokenInfo:
    zeros = torch.zeros(rows, dtype=torch.int64)
    return TokenInfo(zeros, zeros, zeros, zeros, zeros, num_sequences=1)


ROUTERS: list[tuple[Any, dict[str, Any], bool]] = [
    (SoftmaxTopK, {}, True),
    (SoftmaxTopK, {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "capacity_factor": 1.0}, True),
    (SigmoidTopK, {}, True),
    (SoftmaxTopK, {"topk_first": True}, True),
    (SoftmaxTopK, {"balance": "bias"}, True),
    (SoftmaxTopK, {"n_group": 3, "topk_group": 2}, False),
    (SoftmaxTopK, {"weights_on": "input"}, False),
    (SoftmaxTopK, {"eval_capacity_factor": 1.0}, False),
    (SoftmaxTopK, {"gate_bias": True}, False),
    (SoftmaxTopK, {"gate": "cosine", "cosine_size": 8}, False),
    (SoftmaxTopK, {"score_dtype": "bfloat16"}, False),
    (SoftmaxTopK, {"output_dtype": "bfloat16"}, False),
]


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize(("kind", "options", "offers"), ROUTERS, ids=[str(one[1]) for one in ROUTERS])
def test_a_router_decides_the_same_where_it_offers_to(kind: Any, options: dict[str, Any], offers: bool, rows: int):
    made = (SoftmaxTopKOptions if kind is SoftmaxTopK else SigmoidTopKOptions)(**options)
    router, shared = kind(made, dataclasses.replace(CONTEXT, allow_noncausal=True)).eval(), MLP(16, 24)
    with torch.no_grad():
        router.weight.normal_()
        for buffer in router.buffers():
            buffer.normal_()
        x, info = torch.randn(rows, 16), _info(rows)
        expected = router(x, info)
        assert router.serving() is None, "no copy, no offer"
        packed = _copies(shared, router, rows=rows)
        with packed.used():
            served = router.serving()
            assert (served is not None) == offers
            if served is None:
                return
            router.weight.zero_()
            found = served(x, info)
    assert torch.equal(found.expert, expected.expert)
    for name in ("weight", "scores", "logits"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    assert (found.top_k, found.num_experts, found.balance_top_k) == (2, 6, expected.balance_top_k)


def test_a_router_of_another_class_with_a_step_of_its_own_offers_nothing():
    class Other(SoftmaxTopK):
        def select(self, scores: Tensor, info: TokenInfo) -> Tensor:
            return super().select(-scores, info)

    router, shared = Other(SoftmaxTopKOptions(), CONTEXT), MLP(16, 24)
    with torch.no_grad(), _copies(shared, router).used():
        assert router.serving() is None


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "gated", "plain activation"])
def test_a_dense_layer_or_shared_expert_adds_what_it_gives(kind: str, bias: bool, rows: int):
    activation = ReLU2(ReLU2Options(), ActivationContext(16, 0, 1)) if kind == "plain activation" else None
    context = MoEContext(16, 6, 2, 24, 32, 0, 1, 64, mlp_bias=bias)
    part = GatedSharedExpert(GatedOptions(24), context) if kind == "gated" else MLP(16, 24, activation, bias)
    base, x = torch.randn(rows, 16), torch.randn(rows, 16)
    with torch.no_grad():
        expected = base + part(x)
        torch.testing.assert_close(part.serving()(base, x), expected, rtol=1e-5, atol=1e-6)
        with _copies(part, rows=rows).used():
            served, before = part.serving(), base.clone()
            torch.testing.assert_close(served(base, x), expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(base, before)


HOOKED = [(MLP, where) for where in ("up_proj", "down_proj", "")]
HOOKED += [(GatedSharedExpert, where) for where in ("up_proj", "down_proj", "gate", "")]


@pytest.mark.parametrize(("kind", "where"), HOOKED)
def test_who_hooks_into_a_part_is_called(kind: Any, where: str):
    part = MLP(16, 24) if kind is MLP else GatedSharedExpert(GatedOptions(24), CONTEXT)
    seen: list[int] = []
    (part.get_submodule(where) if where else part).register_forward_hook(lambda *given: seen.append(1))
    base, x = torch.randn(ROWS, 16), torch.randn(ROWS, 16)
    with torch.no_grad(), _copies(part).used():
        torch.testing.assert_close(part.serving()(base, x), base + part(x), rtol=1e-5, atol=1e-6)
    assert len(seen) == 2


@pytest.mark.parametrize("kind", [MLP, GatedSharedExpert])
def test_who_changes_the_forward_pass_of_a_part_is_obeyed(kind: Any):
    class Other(kind):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return torch.full_like(x, 3.0)

    part = Other(16, 24) if kind is MLP else Other(GatedOptions(24), CONTEXT)
    base = torch.randn(ROWS, 16)
    with torch.no_grad(), _copies(part).used():
        assert torch.equal(part.serving()(base, base), base + 3)


def test_a_hook_on_a_router_is_called_in_generation():
    layout = {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = ModelConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, moe=MoEConfig(layout=layout),
    )  # fmt: skip
    model, seen = moelab.build(config), []
    model.layers[0].mlp.router.register_forward_hook(lambda module, given, out: seen.append(type(out) is Routing))
    generate_batch(model, [[1, 2]], Sampling(40, temperature=0.0))
    assert seen == [True] * 40
