"""Activation checkpointing: the same gradients, records and names."""

from __future__ import annotations

import torch
from torch import nn

from moelab import Routing, TokenInfo, build
from moelab.config.model import ModelConfig, MoEConfig
from moelab.moe.block import MoEBlock
from moelab.nn.checkpointing import apply_activation_checkpointing
from moelab.nn.transformer import TokenContext, Transformer

LAYOUT = {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


class _Noisy(nn.Module):
    """Chooses by noise of the caller's generator, and counts how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16))
        self.asked = 0

    def forward(self, x: torch.Tensor, info: TokenInfo) -> Routing:
        self.asked += 1
        noise = torch.randn(x.shape[0], 4, generator=info.generator)
        scores = (x @ self.weight.t() + 5 * noise).softmax(-1)
        weight, expert = scores.topk(2)
        return Routing.from_topk(expert, weight, 4, scores=scores)


def _model() -> Transformer:
    config = ModelConfig(
        vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, moe=MoEConfig(layout=LAYOUT),
    )  # fmt: skip
    model = build(config, seed=3)
    torch.manual_seed(5)
    for layer in model.layers:
        layer.mlp.router = _Noisy()
    return model


def _step(model: Transformer) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    ids = torch.arange(24).remainder(17).view(2, 12)
    context = TokenContext(generator=torch.Generator().manual_seed(9))
    output = model(ids, targets=ids, tokens=context)
    balance = sum(record.routing.scores.square().mean() for record in output.records)
    (output.token_loss.mean() + balance).backward()
    return [p.grad for p in model.parameters()], [record.counts for record in output.records]


def test_gradients_and_counts_do_not_change_though_routers_draw_noise():
    plain, checkpointed = _model(), _model()
    apply_activation_checkpointing(checkpointed)
    wanted, found = _step(plain), _step(checkpointed)
    for ours, theirs in zip(found[0] + found[1], wanted[0] + wanted[1], strict=True):
        torch.testing.assert_close(ours, theirs)
    for layer in checkpointed.layers:
        assert isinstance(layer.mlp, MoEBlock)
        assert layer.mlp.router.asked == 2


def test_names_stay_and_only_every_nth_layer_is_computed_again():
    model = _model()
    names = list(model.state_dict())
    apply_activation_checkpointing(model, every=2)
    assert list(model.state_dict()) == names
    _step(model)
    assert [layer.mlp.router.asked for layer in model.layers] == [2, 1, 2]


def test_without_gradients_nothing_is_computed_twice():
    model = _model()
    apply_activation_checkpointing(model)
    with torch.no_grad():
        model(torch.arange(6).view(1, 6), tokens=TokenContext(generator=torch.Generator()))
    assert [layer.mlp.router.asked for layer in model.layers] == [1, 1, 1]
