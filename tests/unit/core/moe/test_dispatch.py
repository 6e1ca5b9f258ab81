"""Dispatch and combine: inverses of each other, and derivatives that need no atomics."""

from __future__ import annotations

import pytest
import torch

from moelab import Routing
from moelab.moe.dispatch import Dispatch, combine_rows, dispatch_plan, gather_rows, inverse_permutation, sum_rows


def _top_k(tokens: int = 9, top_k: int = 3, experts: int = 5) -> Routing:
    expert = torch.rand(tokens, experts).topk(top_k).indices
    return Routing.from_topk(expert, torch.rand(tokens, top_k), experts)


def _ragged() -> Routing:
    """Token 1 has three experts, token 2 none; not in token order."""
    token, expert = torch.tensor([1, 0, 1, 3, 1]), torch.tensor([2, 0, 0, 1, 1])
    return Routing.from_assignments(token, expert, torch.rand(5), 4, 3)


ROUTINGS = {"top_k": _top_k, "ragged": _ragged}


@pytest.mark.parametrize("made", ROUTINGS)
def test_rows_are_in_expert_order_and_then_in_the_routings_order(made: str):
    routing = ROUTINGS[made]()
    plan = dispatch_plan(routing)
    expert = routing.expert[plan.order]
    assert torch.equal(expert, expert.sort().values)
    assert torch.equal(plan.counts, routing.expert.bincount(minlength=routing.num_experts))
    for e in range(routing.num_experts):
        mine = plan.order[expert == e]
        assert torch.equal(mine, mine.sort().values)
    assert torch.equal(plan.token, routing.token[plan.order])


@pytest.mark.parametrize("made", ROUTINGS)
def test_identity_experts_give_each_token_its_weights_sum(made: str):
    routing = ROUTINGS[made]()
    plan, x = dispatch_plan(routing), torch.randn(routing.num_tokens, 4)
    mixed = combine_rows(gather_rows(x, plan), routing.weight, plan)
    total = torch.zeros(routing.num_tokens).index_add(0, routing.token, routing.weight)
    torch.testing.assert_close(mixed, x * total.unsqueeze(-1))


@pytest.mark.parametrize("made", ROUTINGS)
def test_derivatives_pass_gradcheck(made: str):
    routing = ROUTINGS[made]()
    plan = dispatch_plan(routing)
    x = torch.randn(routing.num_tokens, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(routing.token.numel(), 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(routing.token.numel(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, plan), x)
    assert torch.autograd.gradcheck(lambda r, w: combine_rows(r, w, plan), (rows, weight))


def test_a_token_without_experts_gets_zeros():
    routing = _ragged()
    plan = dispatch_plan(routing)
    assert not combine_rows(torch.randn(5, 4), routing.weight, plan)[2].any()


def test_nothing_to_dispatch_gives_zeros():
    nothing = torch.empty(0, dtype=torch.int64)
    plan = dispatch_plan(Routing.from_assignments(nothing, nothing, torch.empty(0), 3, 2))
    assert isinstance(plan, Dispatch)
    assert torch.equal(sum_rows(torch.empty(0, 4), plan.by_token, plan.starts), torch.zeros(3, 4))


def test_bf16_rows_are_added_in_fp32():
    """256 + 1 is 256 in bf16: one rounding at the end gives 260."""
    rows = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert sum_rows(rows, torch.arange(5), torch.tensor([0])).item() == 260


def test_the_inverse_of_a_permutation_undoes_it():
    order = torch.randperm(20)
    assert torch.equal(order[inverse_permutation(order)], torch.arange(20))
