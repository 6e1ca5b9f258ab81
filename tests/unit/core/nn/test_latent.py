"""Latent experts: as Nemotron-H and Kimi K3 compute them, counted right, and refused where they make no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moelab import CheckpointError, ConfigError, Registry, build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import ParallelConfig
from moelab.hf.save import save_hf
from moelab.nn.count import count_parameters, forward_flops_per_token, served_costs
from moelab.planning.memory import predict
from moelab.planning.traffic import TOKENS, Problem

D, LATENT, F, E, K = 32, 12, 20, 8, 3


def config(**moe: Any) -> ModelConfig:
    layout = {"name": "uniform", "num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": F}
    parts: dict[str, Any] = {
        "layout": layout,
        "router": {"name": "sigmoid_topk", "routed_scaling_factor": 2.5},
        "shared_expert": {"name": "plain", "intermediate_size": 24},
        "moe_latent_size": LATENT,
        **moe,
    }
    return ModelConfig(
        vocab_size=60, hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, activation={"name": "relu2"}, moe=MoEConfig(**parts),
    )  # fmt: skip


def test_a_layer_is_nemotron_h_s() -> None:
    """transformers' `NemotronHMoE`: squared ReLU, one projection down and up, the shared expert at full width."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

    fields = NemotronHConfig(
        hidden_size=D, n_routed_experts=E, num_experts_per_tok=K, moe_intermediate_size=F, moe_latent_size=LATENT,
        moe_shared_expert_intermediate_size=24, mlp_hidden_act="relu2", n_group=1, topk_group=1, norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    theirs = NemotronHMoE(fields, 0)
    stream = torch.Generator().manual_seed(0)
    block = build_model(config()).layers[0].mlp
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.3, generator=stream))
        block.router.weight.copy_(theirs.gate.weight)
        block.latent.down_proj.weight.copy_(theirs.fc1_latent_proj.weight)
        block.latent.up_proj.weight.copy_(theirs.fc2_latent_proj.weight)
        block.experts.gate_up.copy_(theirs.experts.up_proj)
        block.experts.down.copy_(theirs.experts.down_proj.mT)
        block.shared_expert.up_proj.weight.copy_(theirs.shared_experts.up_proj.weight)
        block.shared_expert.down_proj.weight.copy_(theirs.shared_experts.down_proj.weight)
        x = torch.randn(1, 17, D, generator=stream)
        info = build_model(config()).token_info(torch.zeros(1, 17, dtype=torch.int64), _positions(17), None, _tokens())
        ours, _ = block(x[0], info)
        expected = theirs(x)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def _positions(length: int) -> torch.Tensor:
    return torch.arange(length)[None]


def _tokens() -> Any:
    from moelab import TokenContext

    return TokenContext()


def test_with_a_norm_a_layer_is_kimi_k3_s() -> None:
    """y = shared(x) + up RMSNorm(sum p_i E_i(down x)), written out in float64."""
    block = build_model(config(moe_latent_norm=True)).layers[0].mlp.double()
    stream = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0.3, 0.5, generator=stream))
    x = torch.randn(9, D, dtype=torch.float64, generator=stream)
    scores = torch.sigmoid(x @ block.router.weight.T)
    weights = torch.zeros_like(scores).scatter(1, scores.topk(K).indices, scores.topk(K).values)
    weights = 2.5 * weights / weights.sum(1, keepdim=True)
    z = x @ block.latent.down_proj.weight.T
    bank = block.experts
    outputs = [torch.relu(z @ up.T) ** 2 @ down for up, down in zip(bank.gate_up, bank.down, strict=True)]
    u = (weights.T[:, :, None] * torch.stack(outputs)).sum(0)
    normed = u / (u.square().mean(1, keepdim=True) + block.latent.norm.eps).sqrt() * block.latent.norm.weight
    shared = torch.relu(x @ block.shared_expert.up_proj.weight.T) ** 2 @ block.shared_expert.down_proj.weight.T
    expected = (shared + normed @ block.latent.up_proj.weight.T).detach()
    info = build_model(config()).token_info(torch.zeros(1, 9, dtype=torch.int64), _positions(9), None, _tokens())
    ours, _ = block(x, info)  # router and norm compute in float32
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("norm", [False, True])
def test_parameters_flops_and_traffic_by_hand(norm: bool) -> None:
    """Every token pays the way there and back, 2 D L; an expert has 2 L F weights; a row sent has L numbers."""
    model = build_model(config(moe_latent_norm=norm), device="meta", seed=None)
    counted, each = count_parameters(model), 2 * LATENT * F
    layer = D * (D + D // 2 * 2 + D) + D + D // 2 * 2 + 2 * D + E * D + 2 * D * 24 + 2 * D * LATENT + norm * LATENT
    assert counted.routed == 2 * E * each
    assert counted.total == 2 * 60 * D + D + 2 * (layer + E * each)
    assert counted.active == counted.total - 2 * (E - K) * each
    per_layer = 3 * D * D + E * D + 2 * D * 24 + 2 * D * LATENT + K * each
    assert forward_flops_per_token(model, 16) == 2 * (2 * per_layer + 60 * D) + 2 * 2 * 16 * D
    assert served_costs(model, 16).expert_weights == (each,) * (2 * E)
    problem = Problem(2, 16, parallel=ParallelConfig(shard=2, expert=2))
    plan = predict(config(moe_latent_norm=norm), problem)
    wide = predict(config(moe_latent_size=None), problem)
    sent, full = (next(c.size for c in found.communication.collectives if c.what == TOKENS) for found in (plan, wide))
    assert sent / full == LATENT / D
    assert plan.total_parameters == counted.total


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        ({"moe_latent_size": D}, f"moe_latent_size: must be in 1 .. {D - 1}, narrower than hidden_size {D}, not {D}"),
        ({"moe_latent_size": 3 * D}, "narrower than hidden_size"),
        ({"moe_latent_size": 0}, "must be in 1"),
        ({"moe_latent_size": None, "moe_latent_norm": True}, "moe_latent_norm: there is no latent space"),
    ],
)
def test_a_space_that_is_none_is_refused(moe: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_model(config(**moe))


def test_an_export_says_what_has_no_place_there(tmp_path: Path) -> None:
    made = config()
    made.mlp_bias = True
    with pytest.raises(CheckpointError) as told:
        save_hf(build_model(made), tmp_path / "out")
    for words in ("model.activation is relu2", "model.mlp_bias is true", "model.moe.moe_latent_size is set"):
        assert f"not representable because {words}" in str(told.value)
    assert not (tmp_path / "out").exists()


def test_all_weights_of_a_layer_learn() -> None:
    model = build_model(config(moe_latent_norm=True), Registry(entry_points=False))
    ids = torch.arange(48).view(2, 24)
    model(ids, targets=ids).token_loss.mean().backward()
    assert all(bool(p.grad.any()) for p in model.layers[1].mlp.latent.parameters())
