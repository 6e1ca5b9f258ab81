"""Chunked cross-entropy against torch's, value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelab.kernels import onednn
from moelab.nn import loss
from moelab.nn.loss import IGNORE_INDEX, logits_and_cross_entropy, token_cross_entropy


def _problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(2, 7, 5, dtype=dtype, requires_grad=True)
    head = torch.randn(11, 5, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 11, (2, 7))
    targets[0, 3] = targets[1, 6] = -100
    return hidden, head, targets


def _reference(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ head.t()).flatten(0, 1)
    nats = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="none")
    return nats.view(targets.shape)


@pytest.mark.parametrize("keep", [0, 10**6], ids=["recomputed", "kept"])
@pytest.mark.parametrize("rows", [3, 14, 100])
def test_values_and_gradients_equal_those_of_full_logits(monkeypatch: pytest.MonkeyPatch, keep: int, rows: int):
    monkeypatch.setattr(loss, "KEEP_ELEMENTS", keep)
    monkeypatch.setattr(loss, "CHUNK_ROWS", rows)
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", {"cpu": 1, "cuda": 1})
    hidden, head, targets = _problem()
    upstream = torch.randn(2, 7, dtype=torch.float64)  # any weighting of the tokens, not only their mean
    found = token_cross_entropy(hidden, head, targets)
    wanted = _reference(hidden, head, targets)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(found, (hidden, head), upstream)
    theirs = torch.autograd.grad(wanted, (hidden, head), upstream)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("zen_5")
@pytest.mark.parametrize("turned", [0, 10**6])
@pytest.mark.parametrize("compute", [token_cross_entropy, lambda *problem: logits_and_cross_entropy(*problem)[1]])
def test_gradients_by_onednn_are_those_of_float64(turned: int, compute, monkeypatch: pytest.MonkeyPatch):
    """Where it computes the head's, too: added up turned, over chunks of which the last is smaller."""
    monkeypatch.setattr(onednn, "LEAST_FLOPS_WIDER", 0)
    monkeypatch.setattr(loss, "TURNED_ELEMENTS", turned)
    monkeypatch.setattr(loss, "CHUNK_ROWS", 4)
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", {"cpu": 1, "cuda": 1})
    hidden, head, targets = _problem(torch.float32)
    assert loss._no_gradient(hidden.flatten(0, 1), head, torch.float32).is_contiguous() == (turned == 0)
    upstream = torch.randn(2, 7)
    found = torch.autograd.grad(compute(hidden, head, targets), (hidden, head), upstream)
    wide = [each.detach().double().requires_grad_() for each in (hidden, head)]
    wanted = torch.autograd.grad(_reference(*wide, targets), wide, upstream.double())
    for one, other in zip(found, wanted, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_ignored_tokens_cost_nothing_and_teach_nothing():
    hidden, head, targets = _problem()
    nats = token_cross_entropy(hidden, head, targets)
    assert nats[0, 3] == 0
    assert nats[1, 6] == 0
    nats.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad[0, 3].any()
    assert not hidden.grad[1, 6].any()


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    nats = token_cross_entropy(torch.ones(1, 4, 8), torch.zeros(16, 8), torch.arange(4).view(1, 4))
    torch.testing.assert_close(nats, torch.full((1, 4), 16.0).log())


def test_under_autocast_losses_are_fp32_of_bf16_logits():
    hidden, head, targets = _problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        nats = token_cross_entropy(hidden, head, targets)
        logits = torch.nn.functional.linear(hidden, head).float()
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
    )
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats.flatten(), wanted, rtol=1e-6, atol=1e-6)
    nats.sum().backward()
    assert head.grad is not None
    assert head.grad.dtype == torch.float32


def test_a_second_backward_pass_gives_the_same_gradient():
    """The kept logits are not overwritten."""
    hidden, head, targets = _problem()
    total = token_cross_entropy(hidden, head, targets).sum()
    first = torch.autograd.grad(total, hidden, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(total, hidden)[0], first, rtol=0, atol=0)


def test_without_gradients_no_logits_are_kept():
    hidden, head, targets = _problem()
    with torch.no_grad():
        assert token_cross_entropy(hidden, head, targets).grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_beside_the_loss_have_the_gradients_of_both(dtype: torch.dtype) -> None:
    """Against torch's own cross-entropy on materialised logits, of which a caller uses both."""
    random = torch.Generator().manual_seed(3)
    targets = torch.tensor([[1, IGNORE_INDEX, 5], [0, 2, IGNORE_INDEX]])
    found = []
    for ours in (True, False):
        random.manual_seed(3)
        hidden = torch.randn(2, 3, 8, generator=random, dtype=dtype, requires_grad=True)
        head = torch.randn(7, 8, generator=random, dtype=dtype, requires_grad=True)
        if ours:
            logits, nats = logits_and_cross_entropy(hidden, head, targets)
        else:
            logits = hidden @ head.t()
            nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        (nats.sum() + 0.1 * logits.square().sum()).backward()
        found.append((logits.detach(), nats.detach(), hidden.grad, head.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_computed_twice_give_the_same_gradients(dtype: torch.dtype) -> None:
    """To the rounding of logits in `dtype`: kept ones are rounded as those that are computed again."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 24, 16, generator=generator)
    head, targets = torch.randn(50, 16, generator=generator), torch.randint(0, 50, (2, 24), generator=generator)
    found = []
    for recompute in (None, False, True):
        leaves = [hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()]
        token_cross_entropy(*leaves, targets, recompute=recompute).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for kept, asked, again in zip(*found, strict=True):
        assert torch.equal(kept, asked)
        torch.testing.assert_close(again, kept, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-4)
