"""The experts of a few tokens: the loop backend's numbers, for every kind of routing."""

from __future__ import annotations

import copy

import pytest
import torch

from moelab.moe import few_rows, thin_product
from moelab.moe.activation import SwiGLU
from moelab.moe.contracts import BackendContext, MoEContext
from moelab.moe.experts import ExpertBank
from moelab.moe.layout import ExpertLayout
from moelab.moe.routing import Routing
from moelab.nn.mlp import MLP
from moelab_plugins.activations.relu2 import moelab_activations
from moelab_plugins.expert_backends.auto import AutoBackend, AutoOptions
from moelab_plugins.expert_backends.batched import BatchedBackend, BatchedOptions
from moelab_plugins.expert_backends.loop import LoopBackend, LoopOptions
from moelab_plugins.routers.softmax_topk import SoftmaxTopK, SoftmaxTopKOptions
from moelab_plugins.shared_experts.gated import GatedOptions, GatedSharedExpert

LAYOUT = ExpertLayout(6, 2, 24)
CONTEXT = BackendContext(LAYOUT, 16, 0, dict)


def _case(tokens: int, *, spread: bool = True, fixed: bool = True, bias: bool = False) -> tuple:
    stream = torch.Generator().manual_seed(tokens)
    relu2 = moelab_activations()[0]
    bank = ExpertBank(LAYOUT, 16, relu2.build(relu2.options(), None) if bias else SwiGLU(), bias=bias)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(0, 0.5, generator=stream)
    score = torch.rand(tokens, 6, generator=stream)
    expert = score.topk(2, dim=-1).indices if spread else torch.tensor([[1, 4]]).expand(tokens, -1)
    routing = Routing.from_topk(expert, torch.rand(tokens, 2, generator=stream), 6)
    if not fixed:
        keep = torch.arange(2 * tokens) % 3 != 1
        routing = Routing.from_assignments(
            routing.token[keep], routing.expert[keep], routing.weight[keep], tokens, 6
        )  # fmt: skip
    return torch.randn(tokens, 16, generator=stream), routing, bank


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("kind", [{}, {"spread": False}, {"fixed": False}, {"bias": True}], ids=str)
def test_a_few_rows_give_what_the_loop_gives(
    tokens: int, kind: dict[str, bool], left: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(thin_product, "reads_matrices_faster", lambda: left)
    monkeypatch.setattr(thin_product, "LEAST_ELEMENTS", 1)
    x, routing, bank = _case(tokens, **kind)
    with torch.inference_mode():
        expected = LoopBackend(LoopOptions(), CONTEXT)(x.double(), routing, bank.double())
        bank = bank.float()
        found = []
        for some in ({}, few_rows.ExpertTables.of_all([bank])):
            with few_rows.reading(some):
                found.append(few_rows.few_rows(x, routing, bank))
    for y in found:
        torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_computed_in_bfloat16():
    x, routing, bank = _case(5)
    with torch.no_grad():
        found = few_rows.few_rows(x.bfloat16(), routing, bank.bfloat16())
        expected = LoopBackend(LoopOptions(), CONTEXT)(x.bfloat16(), routing, bank.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


def test_only_what_needs_no_gradient_and_is_small_is_computed_so():
    x, routing, bank = _case(5)
    assert not few_rows.pays(x, routing, bank)
    with torch.no_grad():
        assert few_rows.pays(x, routing, bank)
        assert not few_rows.pays(x, _case(few_rows.MOST)[1], bank)
        assert not few_rows.pays(x.to("meta"), routing, bank)
    auto = AutoBackend(
        AutoOptions(), BackendContext(LAYOUT, 16, 0, lambda: {"batched": BatchedBackend(BatchedOptions(), CONTEXT)})
    )
    y = auto(x.requires_grad_(), routing, bank)
    y.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(auto(x, routing, bank), y)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("shape", [(1, 32), (2, 32), (8, 32), (9, 32), (3, 5, 32), (0, 32)], ids=str)
def test_products_of_few_rows_are_products(shape: tuple[int, ...], left: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(thin_product, "reads_matrices_faster", lambda: left)
    monkeypatch.setattr(thin_product, "LEAST_ELEMENTS", 1)
    weight, bias = torch.randn(20, 32), torch.randn(40)[::2]  # with gaps
    x = torch.randn(*shape)
    with torch.no_grad():
        for given in (None, bias):
            found = thin_product.few_product(x, weight, given)
            torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, given), rtol=1e-5, atol=1e-5)
            assert found.is_contiguous()


def test_a_matrix_with_gaps_is_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    """oneDNN reads it a thousand times as slowly."""
    monkeypatch.setattr(thin_product, "reads_matrices_faster", lambda: True)
    monkeypatch.setattr(thin_product, "LEAST_ELEMENTS", 1)
    taken = []
    product = thin_product._onednn
    monkeypatch.setattr(thin_product, "_onednn", lambda *given: taken.append(given) or product(*given))
    x, weight = torch.randn(9, 32), torch.randn(20, 64)
    with torch.no_grad():
        thin_product.few_product(x, weight[:, :32])
        assert not taken
        thin_product.few_product(x, weight[:, :32].contiguous())
        with torch.backends.mkldnn.flags(enabled=False):
            thin_product.few_product(x, weight[:, :32].contiguous())
    assert len(taken) == torch.backends.mkldnn.is_available()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN packs them")
@pytest.mark.parametrize("most", [1, 16], ids=["turned", "packed"])
@pytest.mark.parametrize("bagged", [False, True])
def test_packed_matrices_are_read_where_they_are_used_without_gradients_and_nowhere_else(
    most: int, bagged: bool, monkeypatch: pytest.MonkeyPatch
):
    """Zeros written over the originals tell which was read."""
    monkeypatch.setattr(thin_product, "reads_matrices_faster", lambda: True)
    monkeypatch.setattr(thin_product, "LEAST_ELEMENTS", 1)
    monkeypatch.setattr(thin_product, "BAGGED_ELEMENTS", 1 if bagged else 1 << 21)
    first, second, third = torch.randn(24, 33), torch.randn(16, 24), torch.randn(24, 33)
    packed = thin_product.PackedWeights([(first,), (second,), (third,)], 4 * (24 * 33 + 16 * 24), most)
    for rows in (1, 3, 6, 120):
        x, bias = torch.randn(rows, 33) if rows == 1 else torch.randn(rows // 3, 3, 33), torch.randn(24)
        old = first.clone()
        with torch.no_grad(), packed.used():
            first.zero_()
            found = thin_product.few_product(x, first, bias)
            torch.testing.assert_close(found, torch.nn.functional.linear(x, old, bias), rtol=1e-5, atol=1e-5)
            assert thin_product.is_packed(second) and not thin_product.is_packed(third), "no room for it"
            with torch.enable_grad():
                assert torch.equal(thin_product.few_product(x, first, bias), bias.expand(*x.shape[:-1], 24))
        with torch.no_grad():
            assert not thin_product.few_product(x, first).any()
            first.copy_(old)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN packs them")
@pytest.mark.parametrize("rows", [1, 5])
def test_gate_and_up_of_a_layer_are_read_as_one_copy(rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(thin_product, "reads_matrices_faster", lambda: True)
    monkeypatch.setattr(thin_product, "LEAST_ELEMENTS", 1)
    mlp, x = MLP(16, 24), torch.randn(rows, 16)
    packed = thin_product.PackedWeights([(mlp.gate_proj.weight, mlp.up_proj.weight)], 1 << 20, rows)
    with torch.no_grad():
        expected = mlp(x)
        mlp.gate_proj.weight.zero_()
        assert not mlp(x).any()
        with packed.used():
            torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN packs them")
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("bagged", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_is_added_to_what_was_there_with_a_copy_or_without(
    rows: int, bagged: bool, with_bias: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(thin_product, "reads_matrices_faster", lambda: True)
    monkeypatch.setattr(thin_product, "LEAST_ELEMENTS", 1)
    monkeypatch.setattr(thin_product, "BAGGED_ELEMENTS", 1 if bagged else 1 << 21)
    weight, x, base, bias = torch.randn(24, 33), torch.randn(rows, 33), torch.randn(rows, 24), torch.randn(48)[::2]
    given = bias if with_bias else None
    expected = base.double() + x.double() @ weight.double().t() + (bias.double() if with_bias else 0)
    packed = thin_product.PackedWeights([(weight,)], 1 << 20, rows)
    with torch.no_grad():
        before = base.clone()
        alone = thin_product.few_product_onto(base, x, weight, given)
        torch.testing.assert_close(alone.double(), expected, rtol=1e-5, atol=1e-5)
        with packed.used():
            weight.zero_()
            found = thin_product.few_product_onto(base, x, weight, given)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(base, before), "the sum is a tensor of its own"


def test_tokens_of_assignments_that_generation_kept_may_be_trained_with():
    expert = torch.tensor([[0, 1], [2, 0], [1, 2]])
    with torch.inference_mode():
        kept = Routing.from_topk(expert, torch.ones(3, 2), 3)
    assert kept.token.tolist() == [0, 0, 1, 1, 2, 2]
    x = torch.randn(3, 4, requires_grad=True)
    (x * x).index_select(0, kept.token).sum().backward()
    torch.testing.assert_close(x.grad, 4 * x.detach())


def test_tables_serve_more_assignments_and_only_the_weights_they_were_made_of(monkeypatch: pytest.MonkeyPatch):
    """Zeros written over the originals tell which was read; a bank with other weights is not theirs."""
    monkeypatch.setattr(few_rows, "MOST", 1)
    x, routing, bank = _case(40)
    with torch.no_grad():
        expected = few_rows.few_rows(x, routing, bank)
        tables = few_rows.ExpertTables.of_all([bank])
        monkeypatch.setattr(few_rows, "MOST_NUMBERS", 80 * 48 - 1)
        smaller = few_rows.ExpertTables.of_all([bank])
        other = copy.deepcopy(bank)
        bank.gate_up.zero_()
        assert not few_rows.pays(x, routing, bank)
        with few_rows.reading(tables):
            assert few_rows.pays(x, routing, bank)
            assert not few_rows.pays(x, routing, other)
            torch.testing.assert_close(few_rows.few_rows(x, routing, bank), expected, rtol=1e-5, atol=1e-5)
            with torch.enable_grad():
                assert few_rows._tables(x, routing, bank) is None
        with few_rows.reading(smaller):
            assert not few_rows.pays(x, routing, bank), "they would take too much memory"
        assert not few_rows.pays(x, routing, bank)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN packs them")
@pytest.mark.parametrize("rows", [1, 5])
def test_matrices_that_read_the_same_rows_are_one_product_of_the_rows_that_came_last(
    rows: int, monkeypatch: pytest.MonkeyPatch
):
    """A shared expert with its gate, and a router: zeros in the originals tell that the copy was read."""
    monkeypatch.setattr(thin_product, "reads_matrices_faster", lambda: True)
    monkeypatch.setattr(thin_product, "LEAST_ELEMENTS", 1)
    context = MoEContext(16, 6, 2, 24, 32, 0, 1, 64)
    shared, router = GatedSharedExpert(GatedOptions(24), context), SoftmaxTopK(SoftmaxTopKOptions(), context)
    with torch.no_grad():
        router.weight.normal_()
    together = (*shared.reading_input(), *router.reading_input())
    assert [one.shape[0] for one in together] == [24, 24, 1, 6]
    packed = thin_product.PackedWeights([together], 1 << 20, rows)
    several = [torch.randn(rows, 16) for _ in range(3)]
    with torch.no_grad():
        expected = [(shared(x), router.logits(x)) for x in several]
        for one in together:
            one.zero_()
        with packed.used():
            for x, (out, logits) in zip(several, expected, strict=True):
                torch.testing.assert_close(router.logits(x), logits, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(shared(x), out, rtol=1e-5, atol=1e-5)
        assert not router.logits(several[0]).any()
        shared.gate.register_forward_hook(lambda *call: None)
        assert len(shared.reading_input()) == 2, "who looks at the gate sees it called"
