"""A router that the text can't teach is told of before a run; one that it can teach is not."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moelab
from moelab import MoEContext, Registry, Routing, TokenInfo
from moelab.builder import build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.data.batches import Batch
from moelab.hookspecs import ROUTERS
from moelab.moe.block import MoEBlock
from moelab.nn.count import flops_per_token
from moelab.testing.tensors import make_info
from moelab.training.precision import Precision
from moelab.training.rehearsal import probe_step
from moelab.training.router_gradient import NEGLIGIBLE, hears_the_text
from moelab.training.step import StepSettings

REGISTRY = Registry(entry_points=False)
CONTEXT = MoEContext(32, 8, 2, 12, 32, layer_id=0, num_hidden_layers=2, vocab_size=64, allow_noncausal=True)


def x_and_info(training: bool = True) -> tuple[Tensor, TokenInfo]:
    stream = torch.Generator().manual_seed(4)
    return torch.randn(16, 32, generator=stream), make_info(1, 16, 64, training=training)


def build(name: str, top_k: int, std: float = 0.02, **options: Any) -> Any:
    router = REGISTRY.build(ROUTERS, {"name": name, **options}, replace(CONTEXT, num_experts_per_tok=top_k), "router")
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=stream) * std)
    return router


# name, experts a token, options, whether the text teaches it
CASES: list[tuple[str, int, dict[str, Any], bool]] = [
    *[(name, 1, {"norm_topk_prob": True}, False) for name in ("softmax_topk", "sigmoid_topk", "sqrtsoftplus_topk")],
    *[(name, 1, {"norm_topk_prob": False}, True) for name in ("softmax_topk", "sigmoid_topk", "sqrtsoftplus_topk")],
    *[(name, 2, {"norm_topk_prob": True}, True) for name in ("softmax_topk", "sigmoid_topk", "sqrtsoftplus_topk")],
    ("softmax_topk", 1, {"topk_first": True}, False),
    ("softmax_topk", 1, {"norm_topk_prob": True, "projection_dtype": "bfloat16", "score_dtype": "bfloat16"}, False),
    ("softmax_topk", 2, {"projection_dtype": "bfloat16", "score_dtype": "bfloat16"}, True),
    ("switch", 1, {}, True),
    ("gshard", 2, {}, True),
    ("gshard", 2, {"capacity_factor": 1.0}, True),
    ("noisy_topk", 1, {}, False),  # a softmax over one logit
    ("noisy_topk", 2, {}, True),
    ("base", 1, {}, True),
    ("sinkhorn", 1, {}, True),
    ("top_p", 2, {}, True),
    ("remoe", 2, {}, True),
    ("softmax_topk", 2, {"topk_first": True, "gate_bias": True}, True),
    ("softmax_topk", 2, {"gate": "cosine", "cosine_size": 4}, True),
    ("softmax_topk", 1, {"token_table": {}, "norm_topk_prob": True}, False),
    ("sqrtsoftplus_topk", 2, {"token_table": {}, "balance": "none"}, True),
    ("sigmoid_topk", 1, {"norm_topk_prob": False, "balance": "none", "weights_on": "input"}, True),
    ("softmax_topk", 2, {"document_pool": {"smallest": 2, "largest": 3}}, True),
    ("null_experts", 2, {"null_output": "copy", "norm_topk_prob": False}, True),
    ("expert_threshold", 2, {}, True),
    ("null_experts", 1, {}, False),
    ("null_experts", 2, {}, True),
    ("moe_plus_plus", 1, {}, True),
    ("moe_plus_plus", 1, {"weights": "released"}, False),  # its constants hear of the text, its matrix does not
    ("moe_plus_plus", 2, {"weights": "released", "gate_layers": 2}, True),
    ("expert_choice", 2, {}, True),
    ("mixture_of_depths", 1, {}, False),  # as above, with its choice of tokens
    ("mixture_of_depths", 2, {}, True),
    ("token_rounding", 2, {"tile": 2}, True),
    ("hash", 1, {}, True),  # nothing to teach
    ("forced_random", 2, {}, True),
    ("forced_round_robin", 2, {}, True),
]


def test_every_router_is_tried() -> None:
    assert {name for name, *_ in CASES} == set(REGISTRY.components(ROUTERS))


@pytest.mark.parametrize(("name", "top_k", "options", "heard"), CASES)
@pytest.mark.parametrize("std", [0.02, 0.0, 0.5])
def test_what_the_text_teaches_is_told_from_what_it_does_not(
    name: str, top_k: int, options: dict[str, Any], heard: bool, std: float
) -> None:
    """Whatever the size of the matrix, zeros included; and the router is as before, to the last bit."""
    router = build(name, top_k, std, **options)
    before = {key: value.clone() for key, value in router.state_dict().items()}
    assert hears_the_text(router, *x_and_info()) == heard
    assert all(torch.equal(value, before[key]) for key, value in router.state_dict().items())
    assert all(parameter.grad is None for parameter in router.parameters())


class Stranger(nn.Module):
    """One's own router, as the README has it."""

    def __init__(self, options: Any, context: MoEContext) -> None:
        super().__init__()
        self.top_k, self.experts = context.num_experts_per_tok, context.num_experts
        self.weight = nn.Parameter(torch.empty(context.num_experts, context.hidden_size))

    def logits(self, x: Tensor) -> Tensor:
        return x.float() @ self.weight.float().t()

    def weigh(self, weight: Tensor) -> Tensor:
        return weight

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        scores = self.logits(x).softmax(-1)
        weight, expert = scores.topk(self.top_k)
        return Routing.from_topk(expert, self.weigh(weight), self.experts, scores=scores, token_mask=info.mask)


class Detached(Stranger):
    def weigh(self, weight: Tensor) -> Tensor:
        return weight.detach()


class Equal(Stranger):
    def weigh(self, weight: Tensor) -> Tensor:
        return torch.full_like(weight, 1 / self.top_k)


class Signed(Stranger):
    """A graph whose gradient is zero everywhere."""

    def weigh(self, weight: Tensor) -> Tensor:
        return torch.sign(weight)


class LogSumExp(Stranger):
    """Normalised by another road: what is left is rounding."""

    def weigh(self, weight: Tensor) -> Tensor:
        return (weight.log() - weight.log().logsumexp(-1, keepdim=True)).exp()


class Frozen(Stranger):
    """A random projection on purpose."""

    def __init__(self, options: Any, context: MoEContext) -> None:
        super().__init__(options, context)
        self.weight.requires_grad_(False)


class TwoLayers(Stranger):
    """Its second matrix starts at zero, which hides the first."""

    def __init__(self, options: Any, context: MoEContext) -> None:
        super().__init__(options, context)
        self.weight = nn.Parameter(torch.randn(24, context.hidden_size))
        self.second = nn.Parameter(torch.zeros(context.num_experts, 24))

    def logits(self, x: Tensor) -> Tensor:
        return (x @ self.weight.t()).tanh() @ self.second.t()


@pytest.mark.parametrize(
    ("kind", "top_k", "heard"),
    [
        (Stranger, 2, True), (Stranger, 1, True), (Detached, 2, False), (Equal, 2, False), (Signed, 2, False),
        (LogSumExp, 1, False), (LogSumExp, 2, True), (Frozen, 2, True), (TwoLayers, 2, True),
    ],
)  # fmt: skip
def test_a_router_of_ones_own_is_judged_alike(kind: Any, top_k: int, heard: bool) -> None:
    router = kind(None, replace(CONTEXT, num_experts_per_tok=top_k))
    if kind is not TwoLayers:
        nn.init.normal_(router.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    assert hears_the_text(router, *x_and_info()) == heard


def test_a_healthy_router_is_far_from_the_line() -> None:
    """By three orders of magnitude either side, so that no rounding decides."""
    for top_k, heard in ((1, False), (2, True)):
        router = build("softmax_topk", top_k, norm_topk_prob=True)
        weight = router(*x_and_info()).weight
        signs = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad((weight * signs).sum(), [router.weight])
        measure = float(gradient.norm() * router.weight.detach().square().mean().sqrt() / weight.detach().norm())
        assert (measure > 1000 * NEGLIGIBLE) if heard else (measure < NEGLIGIBLE / 100)


@dataclass
class NoOptions:
    pass


def _model(top_k: int, layers: dict[str, Any] | None = None, **more: Any) -> Any:
    layout = {"name": "uniform", "num_experts": 8, "num_experts_per_tok": top_k, "moe_intermediate_size": 16}
    moe = MoEConfig(
        layout=layout,
        router={"name": "softmax_topk", "norm_topk_prob": True},
        balance_losses=[],
        layers=layers or {},
        **more,
    )
    config = ModelConfig(64, 32, 48, 4, 4, 2, initializer_range=0.2, moe=moe)
    return build_model(config, moelab.Registry(entry_points=False), seed=1)


def _probe(model: Any) -> None:
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(3))
    zeros = torch.zeros_like(ids)
    settings = StepSettings(2, 0.0, 0, Precision(torch.device("cpu"), torch.float32))
    probe_step(model, [], Batch(ids, ids, zeros, zeros), settings)


def test_a_run_warns_naming_layers_key_and_cure(caplog: pytest.LogCaptureFixture) -> None:
    model = _model(1, {"2-": {"router": {"norm_topk_prob": False}}, "1": {"router": {"name": "sigmoid_topk"}}})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING, logger="moelab"):
        _probe(model)
    first, second = caplog.messages
    assert first.startswith("model.moe.router, layer 0: the text gives this router no gradient")
    assert second.startswith('model.moe.layers."1".router, layer 1: the text gives this router no gradient')
    assert "norm_topk_prob=false" in first
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(block._forward_pre_hooks for block in model.modules())


def test_a_backend_that_has_no_router_to_teach_is_told_and_counts_no_expert_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first layer's table learns nothing; the others' routers hear of every expert."""
    hashed = {"1": {"router": {"name": "hash"}}}
    model = _model(2, hashed, backend={"name": "densemixer"})
    with caplog.at_level(logging.WARNING, logger="moelab"):
        _probe(model)
    (line,) = caplog.messages
    assert line.startswith("model.moe.backend, layer 1: densemixer lets a router hear of every expert, and the router")
    assert [block.computes_every_expert for block in model.modules() if isinstance(block, MoEBlock)] == [
        True, False, True, True,
    ]  # fmt: skip
    idle = flops_per_token(model, 24) - flops_per_token(_model(2, hashed), 24)
    assert idle == 3 * (8 - 2) * 2 * (3 * 32 * 16)


def test_a_sound_run_and_a_model_that_is_only_used_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="moelab"):
        _probe(_model(2))
        model = _model(1).eval()
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert not caplog.messages
    assert any(isinstance(module, MoEBlock) for module in model.modules())
