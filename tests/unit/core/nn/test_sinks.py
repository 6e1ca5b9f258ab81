"""Attention sinks: every way of computing them is one softmax with a logit more; and a model that has them.

Windows, chunks, documents and FlexAttention: the kit's `equals_its_definition`, which the other files of this folder
run under small blocks and without kernels, has sinks in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import moelab
from moelab import Component, ConfigError, Registry, component, hookimpl, testing
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import OptimizerConfig
from moelab.hookspecs import ATTENTIONS
from moelab.nn import causal_attention, full_attention, fused_parts, sinks
from moelab.nn.attention_inputs import AttentionContext, AttentionInputs, AttentionKernel
from moelab.nn.checkpointing import apply_activation_checkpointing
from moelab.nn.count import count_parameters, flops_per_token
from moelab.nn.full_attention import FullAttention
from moelab.nn.transformer import TokenContext
from moelab.testing import ConformanceError
from moelab.testing import attentions as kit
from moelab.training.optimizer import build_adamw

REGISTRY = Registry(entry_points=False)
LAYOUT = {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODEL = ModelConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3, moe=MoEConfig(layout=LAYOUT), attention_sinks=True, o_bias=True,
)  # fmt: skip


def joined(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, column: Tensor) -> Tensor:
    """The definition in float64: softmax over the scores of keys and the sink, whose weight is dropped."""
    share = query.shape[1] // key.shape[1]
    query, key, value = query.double(), *(each.double().repeat_interleave(share, 1) for each in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    seq, length = scores.shape[-2:]
    seen = torch.ones(seq, length, dtype=torch.bool).tril(length - seq) if mask is None else mask
    scores = scores.masked_fill(~seen, float("-inf"))
    column = column.double()[:, None, None].expand(len(scores), -1, seq, -1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value


def drawn(seq: int, dtype: torch.dtype = torch.float32, past: int = 0) -> list[Tensor]:
    """Query, key, value and sinks: 6 heads in 2 groups, of 16."""
    stream = torch.Generator().manual_seed(seq)
    shapes = [(2, 6, seq, 16), *[(2, 2, past + seq, 16)] * 2, (6,)]
    made = [torch.randn(shape, generator=stream).to(dtype) for shape in shapes]
    made[3] = made[3] * 3
    return [each.requires_grad_() for each in made]


def agree(by: Callable[..., Tensor], leaves: list[Tensor], mask: Tensor | None = None, close: float = 1e-5) -> None:
    """Output and all gradients are the definition's."""
    query, key, value, column = leaves
    found, wanted = by(query, key, value, mask, column), joined(query, key, value, mask, column)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = [(found, wanted)]
    pairs += zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((wanted * weight).sum(), leaves),
        strict=True,
    )
    for one, other in pairs:
        assert float((one.double() - other).detach().abs().max()) <= close * float(other.detach().abs().max())


@pytest.mark.parametrize("keep", [0, 1 << 24], ids=["computed again", "kept"])
@pytest.mark.parametrize("together", [1, 1 << 19], ids=["one sequence", "all"])
def test_blocks_of_a_plain_text_are_one_softmax(keep: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_attention, "KEEP_ELEMENTS", keep)
    monkeypatch.setattr(causal_attention, "BATCH_ELEMENTS", together)
    agree(lambda q, k, v, _, s: causal_attention.causal_attention(q, k, v, s), drawn(150))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_told_the_sum_with_the_sink_gives_its_gradients(dtype: torch.dtype) -> None:
    agree(lambda q, k, v, _, s: sinks.fused_causal(q, k, v, s), drawn(70, dtype))


def test_normed_heads_beside_narrow_values_go_through_the_kernel_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast a norm of heads gives fp32, and the values are as narrow as their projection made them."""
    monkeypatch.setattr(full_attention, "blocks_pay", lambda query: False)  # as beyond 1,024 positions
    model = moelab.build(dataclasses.replace(MODEL, use_qk_norm=True, moe=None))
    ids = torch.randint(0, 50, (1, fused_parts.LEAST_QUERIES), generator=torch.Generator().manual_seed(0))
    wanted = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids).logits
    assert float((found - wanted).detach().abs().max()) < 0.1 * float(wanted.detach().abs().max())
    found.float().square().mean().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "sinks" in name)


def test_all_pairs_under_masks_are_one_softmax() -> None:
    agree(sinks.all_pairs, drawn(9))
    agree(sinks.all_pairs, drawn(1, past=12), torch.ones(1, 1, 1, 13, dtype=torch.bool))
    holes = torch.rand(2, 1, 5, 12, generator=torch.Generator().manual_seed(0)) > 0.4
    holes[..., 0] = True
    agree(sinks.all_pairs, drawn(5, past=7), holes)


@pytest.mark.parametrize("size", [-40.0, 40.0])
def test_sinks_of_any_size_are_finite(size: float) -> None:
    """One that takes nothing, whose gradient is tiny and right; and one that takes all."""
    leaves = drawn(20)
    leaves[3] = torch.full((6,), size, requires_grad=True)
    for by in (
        lambda q, k, v, _, s: causal_attention.causal_attention(q, k, v, s),
        lambda q, k, v, _, s: sinks.fused_causal(q, k, v, s),
    ):
        agree(by, leaves, close=1e-4)


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({"LEAST_ELEMENTS": 0}, "causal_attention"),
        ({"LEAST_QUERIES": 2}, "fused_causal"),
        ({}, "masked_attention"),
        ({"LEAST_ROWS": 1 << 20}, "all_pairs"),
    ],
)
def test_every_way_conforms_and_is_taken(changes: dict[str, int], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def counted(*given: Any) -> Tensor:
        taken.append(way)
        return original(*given)

    original = getattr(full_attention, way)
    for key, value in changes.items():
        module = {"LEAST_ELEMENTS": causal_attention, "LEAST_QUERIES": fused_parts}.get(key, full_attention)
        monkeypatch.setattr(module, key, value)
    monkeypatch.setattr(full_attention, way, counted)
    case = testing.AttentionCase(
        REGISTRY.components(ATTENTIONS)["full"], definition=lambda i, j: (i - j, j <= i, torch.ones(()))
    )
    kit.equals_its_definition(case)
    kit.sinks_take_their_share(case)
    assert taken


class Deaf(FullAttention):
    """Says that it serves sinks, and doesn't hear of them."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        return super().__call__(query, key, value, dataclasses.replace(inputs, sinks=None))


class Silent(FullAttention):
    """Says nothing of sinks."""

    serves_sinks = False


@dataclasses.dataclass
class NoOptions:
    """None."""


class Mine:
    """A plugin with both."""

    @hookimpl
    def moelab_attentions(self) -> list[Component[AttentionContext, AttentionKernel]]:
        return [
            component(kind.__name__.lower(), NoOptions, lambda _, context, kind=kind: kind(context.layer_id))
            for kind in (Deaf, Silent)
        ]


def test_an_attention_that_does_not_hear_of_sinks_is_found_out_or_refused() -> None:
    registry = Registry(entry_points=False)
    registry.manager.register(Mine())
    with pytest.raises(ConformanceError, match="sinks_take_their_share"):
        testing.check_attention(registry.components(ATTENTIONS)["deaf"])
    testing.check_attention(registry.components(ATTENTIONS)["silent"])
    silent = dataclasses.replace(MODEL, attention={"name": "silent"})
    with pytest.raises(ConfigError, match=r"does not serve model\.attention_sinks"):
        moelab.build_model(silent, registry)
    moelab.build_model(dataclasses.replace(silent, attention_sinks=False), registry)


def test_a_sink_of_no_size_is_no_sink() -> None:
    model, plain = moelab.build(MODEL).eval(), moelab.build(dataclasses.replace(MODEL, attention_sinks=False)).eval()
    ids = torch.randint(0, 50, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        there = model(ids).logits
        assert not torch.allclose(there, plain(ids).logits, atol=1e-3)
        for layer in model.layers:
            layer.self_attn.sinks.fill_(-1e4)
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)


def test_they_are_drawn_and_counted_and_do_not_decay() -> None:
    model = moelab.build(MODEL)
    plain = moelab.build(dataclasses.replace(MODEL, attention_sinks=False, o_bias=False))
    assert count_parameters(model).total == count_parameters(plain).total + 2 * (4 + 32)
    assert flops_per_token(model, 64) == flops_per_token(plain, 64)
    found = torch.stack([layer.self_attn.sinks for layer in model.layers])
    assert 0.05 < float(found.detach().std()) < 0.9
    optimizer = build_adamw(model, OptimizerConfig(lr=1e-3, weight_decay=0.1))
    decays = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]}
    assert decays["layers.0.self_attn.sinks"] == decays["layers.0.self_attn.o_proj.bias"] == 0
    assert decays["layers.0.self_attn.o_proj.weight"] == 0.1


def test_checkpointed_layers_and_packed_documents_give_the_same_gradients() -> None:
    ids = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(24).expand(2, -1) // 9
    found = []
    for checkpointed in (False, True):
        model = moelab.build(MODEL).train()
        if checkpointed:
            apply_activation_checkpointing(model, every=1)
        packed = model(ids, targets=ids, tokens=TokenContext(attention_id=documents)).token_loss
        packed.sum().backward()
        sunk = [p.grad for name, p in model.named_parameters() if "sinks" in name]
        assert len(sunk) == 2
        assert all(bool((each != 0).all()) for each in sunk)
        found.append((packed.detach(), *sunk))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    model.eval()
    with torch.no_grad():
        alone = model(ids[:, 9:18]).logits
        there = model(ids, tokens=TokenContext(attention_id=documents)).logits[:, 9:18]
    torch.testing.assert_close(there, alone, rtol=1e-4, atol=1e-4)
