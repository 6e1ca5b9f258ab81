"""Expert chunks: the same numbers, fewer rows at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelab import Registry, Routing, build
from moelab.config.model import ModelConfig, MoEConfig
from moelab.hookspecs import EXPERT_BACKENDS
from moelab.moe.chunked import compute_in_chunks
from moelab.moe.experts import ExpertBank
from moelab.moe.layout import ExpertLayout


class _Watched:
    """The reference backend, noting how many assignments it is given."""

    name = "watched"

    def __init__(self) -> None:
        self._inner = Registry(entry_points=False).components(EXPERT_BACKENDS)["loop"].build(None, None)  # type: ignore[arg-type]
        self.seen: list[int] = []

    def supports(self, problem: object) -> str | None:
        return None

    def __call__(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        self.seen.append(routing.expert.numel())
        return self._inner(x, routing, bank)


def _bank() -> ExpertBank:
    bank = ExpertBank(ExpertLayout(4, 2, 6), 8).double()
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    return bank


def _routings() -> dict[str, Routing]:
    token = torch.tensor([3, 0, 0, 5, 0, 1, 5, 0])
    weight = torch.rand(8, dtype=torch.float64, requires_grad=True)
    return {
        "top_k": Routing.from_topk(torch.rand(7, 4).topk(2).indices, torch.rand(7, 2).double().requires_grad_(), 4),
        "ragged": Routing.from_assignments(token, torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]), weight, 6, 4),
    }


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 100])
@pytest.mark.parametrize("made", ["top_k", "ragged"])
def test_values_and_gradients_are_those_of_one_piece(made: str, limit: int):
    routing, bank, backend = _routings()[made], _bank(), _Watched()
    x = torch.randn(routing.num_tokens, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x, *bank.parameters()]
    whole, parts = backend(x, routing, bank), compute_in_chunks(backend, x, routing, bank, limit)
    torch.testing.assert_close(parts, whole)
    upstream = torch.randn_like(whole)
    for ours, theirs in zip(
        torch.autograd.grad(parts, inputs, upstream), torch.autograd.grad(whole, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_no_chunk_exceeds_the_limit_but_that_of_a_single_token():
    routing, bank, backend = _routings()["ragged"], _bank(), _Watched()
    compute_in_chunks(backend, torch.randn(6, 8, dtype=torch.float64), routing, bank, 3)
    assert backend.seen == [4, 2, 2]  # token 0; tokens 1 .. 3; tokens 4 .. 5


def test_a_model_computes_its_experts_in_chunks_when_told():
    layout = {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}

    def logits(chunk: int | None) -> Tensor:
        config = ModelConfig(
            vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, moe=MoEConfig(layout=layout, expert_chunk=chunk),
        )  # fmt: skip
        return build(config, seed=3)(torch.arange(12).view(1, 12)).logits

    torch.testing.assert_close(logits(5), logits(None))
