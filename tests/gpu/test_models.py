"""Whole models on the device: the CPU's numbers, and never a wait for the device in a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import moelab
from conformance.test_builtins import ACTIVATION_CASES, ATTENTION_CASES, LOSS_CASES, ROUTER_CASES, SHARED_CASES
from moelab.builder import build_balance_losses
from moelab.config.latent_attention import LatentAttentionConfig
from moelab.config.model import ModelConfig, MoEConfig
from moelab.moe.balance import NamedLoss
from moelab.moe.batch_statistics import BatchStatistics
from moelab.nn.transformer import TokenContext, Transformer
from on_device import DEVICE, full_precision, never_waiting, rehearsed

pytestmark = pytest.mark.gpu

VOCABULARY, SEQUENCES, POSITIONS = 96, 2, 48
REGISTRY = moelab.Registry(entry_points=False)
WHILE_TRAINING = {"noisy_load", "depth_predictor", "expert_router_coupling"}  # need what is drawn then, or made
WAITING = {"base": "solves an assignment problem on the host"}


def config_of(
    router: dict[str, Any], top_k: int = 2, losses: Sequence[dict[str, Any]] = (), **more: Any
) -> ModelConfig:
    layout = {"name": "uniform", "num_experts": 8, "num_experts_per_tok": top_k, "moe_intermediate_size": 32}
    moe = MoEConfig(
        layout=layout, router=router, allow_noncausal=True, balance_losses=list(losses),
        shared_expert=more.pop("shared_expert", {"name": "gated", "intermediate_size": 32}),
    )  # fmt: skip
    return ModelConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=16, moe=moe, **more,
    )  # fmt: skip


@cache
def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens, and the documents they belong to."""
    ids = torch.randint(0, VOCABULARY, (SEQUENCES, POSITIONS), generator=torch.Generator().manual_seed(2))
    documents = (torch.arange(POSITIONS) >= torch.tensor([[20], [31]])).long() + torch.tensor([[0], [2]])
    return ids.to(device), documents.to(device)


def prepared(config: ModelConfig, device: torch.device) -> tuple[Transformer, list[NamedLoss]]:
    model = moelab.build(config, device="cpu")
    for parameter in model.parameters():
        if not bool(parameter.any()):  # a router that begins at zero ties all experts, and each device breaks ties anew
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return model.to(device), build_balance_losses(config, REGISTRY)


def forward_backward(
    model: Transformer, losses: list[NamedLoss], dtype: torch.dtype = torch.float32, mask_documents: bool = False
) -> dict[str, Tensor]:
    """{term: its value, parameter: its gradient}, all on the device. One micro-batch as a training step has it."""
    device = next(model.parameters()).device
    ids, documents = batch(device)
    tokens = TokenContext(documents, generator=torch.Generator().manual_seed(3))
    if mask_documents:
        tokens = replace(tokens, attention_id=documents)
    model.zero_grad(set_to_none=True)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        output = model(ids, targets=ids.roll(-1, 1), tokens=tokens)
    assert output.token_loss is not None
    seen = BatchStatistics(losses)
    seen.add(output.records)
    terms = {"lm_loss": output.token_loss.mean()}
    terms |= {named.name: named(output.records, seen.context(named)) for named in losses}
    torch.stack(list(terms.values())).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in terms.items()} | gradients


def agrees(config: ModelConfig, mask_documents: bool = False) -> None:
    """Losses and gradients of an evaluating model, which draws no noise, in fp32 as on the CPU."""
    found = []
    for device in (torch.device("cpu"), DEVICE):
        model, losses = prepared(config, device)
        with full_precision():
            found.append(forward_backward(model.eval(), losses, mask_documents=mask_documents))
    here, there = found
    assert here.keys() == there.keys()
    for name, value in here.items():
        scale = max(float(value.abs().max()), 1e-3)
        difference = float((there[name].cpu() - value).abs().max())
        assert difference < 1e-3 * scale, f"{name}: {difference:g} beside {scale:g}"


def never_waits(config: ModelConfig, mask_documents: bool = False) -> None:
    """Training in bf16, after one pass that may: what the parts return is looked at once."""
    model, losses = prepared(config, DEVICE)
    model.train()
    forward_backward(model, losses, torch.bfloat16, mask_documents)
    with never_waiting():
        forward_backward(model, losses, torch.bfloat16, mask_documents)


ROUTERS = [
    pytest.param({"name": name, **options}, context.get("num_experts_per_tok", 2), id=f"{name}-{index}")
    for name, cases in ROUTER_CASES.items()
    for index, (options, context) in enumerate(rehearsed(cases))
]


@pytest.mark.parametrize(("router", "top_k"), ROUTERS)
def test_a_router_gives_the_cpus_losses_and_gradients(router: dict[str, Any], top_k: int) -> None:
    if router["name"] == "forced_random":
        pytest.skip("draws on the device, in evaluation too")
    agrees(config_of(router, top_k))


@pytest.mark.parametrize(("router", "top_k"), ROUTERS)
def test_a_router_never_waits_for_the_device(router: dict[str, Any], top_k: int) -> None:
    if router["name"] in WAITING:
        pytest.skip(WAITING[router["name"]])
    never_waits(config_of(router, top_k))


LOSSES = [
    pytest.param({"name": name, "weight": 1.0, **options}, {"name": router or "softmax_topk", **more}, id=f"{name}-{i}")
    for name, cases in LOSS_CASES.items()
    for i, (options, router, more, _) in enumerate(rehearsed(cases))
]


@pytest.mark.parametrize(("loss", "router"), LOSSES)
def test_a_balance_loss_gives_the_cpus_value_and_gradients_and_never_waits(
    loss: dict[str, Any], router: dict[str, Any]
) -> None:
    config = config_of(router, losses=[loss])
    if loss["name"] not in WHILE_TRAINING:
        agrees(config)
    if router["name"] not in WAITING:
        never_waits(config)


@pytest.mark.parametrize("mask_documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize(
    "attention",
    [
        pytest.param({"name": name, **case[0]}, id=f"{name}-{i}")
        for name, c in ATTENTION_CASES.items()
        for i, case in enumerate(rehearsed(c))
    ],
)
def test_an_attention_gives_the_cpus_losses_and_gradients_and_never_waits(
    attention: dict[str, Any], mask_documents: bool
) -> None:
    config = config_of({"name": "softmax_topk"}, attention=attention)
    agrees(config, mask_documents)
    never_waits(config, mask_documents)


LATENT = LatentAttentionConfig(kv_lora_rank=24, q_lora_rank=20, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
# Of a model, whichever plugin computes them.
MADE_OTHERWISE: dict[str, dict[str, Any]] = {
    "latent": {"latent_attention": LATENT, "num_key_value_heads": 4, "qkv_bias": False},
    "latent window": {
        "latent_attention": replace(LATENT, q_lora_rank=None), "num_key_value_heads": 4, "qkv_bias": False,
        "attention": {"name": "sliding_window", "window": 20},
    },
    "sinks": {"attention_sinks": True, "o_bias": True},
    "sinks window": {"attention_sinks": True, "attention": {"name": "sliding_window", "window": 20, "layers": "0-/2"}},
}  # fmt: skip


@pytest.mark.parametrize("mask_documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("kind", MADE_OTHERWISE)
def test_latent_attention_and_sinks_give_the_cpus_losses_and_gradients_and_never_wait(
    kind: str, mask_documents: bool
) -> None:
    config = replace(config_of({"name": "softmax_topk"}), **MADE_OTHERWISE[kind])
    agrees(config, mask_documents)
    never_waits(config, mask_documents)


@pytest.mark.parametrize("name", ACTIVATION_CASES)
def test_an_activation_gives_the_cpus_losses_and_gradients_and_never_waits(name: str) -> None:
    config = config_of({"name": "softmax_topk"}, activation={"name": name})
    agrees(config)
    never_waits(config)


@pytest.mark.parametrize("name", SHARED_CASES)
def test_a_shared_expert_gives_the_cpus_losses_and_gradients_and_never_waits(name: str) -> None:
    config = config_of({"name": "softmax_topk"}, shared_expert={"name": name, **SHARED_CASES[name]})
    agrees(config)
    never_waits(config)
