"""Activations compute what the published models do, through every backend, dense layers and shared experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expert_routings import EXPERTS, TOP_K, skewed
from moelab import BackendContext, ConfigError, ExpertBackend, Registry, UserError, build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.hookspecs import ACTIVATIONS, EXPERT_BACKENDS
from moelab.moe.activation import Activation, ActivationContext
from moelab.moe.block import MoEBlock
from moelab.moe.experts import ExpertBank
from moelab.moe.layout import ExpertLayout
from moelab.nn.count import count_parameters, forward_flops_per_token, served_costs
from moelab.nn.mlp import MLP
from moelab.training.optimizer import build_adamw

REGISTRY = Registry(entry_points=False)
NAMES = sorted(REGISTRY.components(ACTIVATIONS))
BACKENDS = ["loop", "grouped_mm", "batched"]
D, F = 16, 8


def activation(name: str, **options: Any) -> Activation:
    return REGISTRY.build(ACTIVATIONS, {"name": name, **options}, ActivationContext(D, 0, 2), "here")


def backend(name: str) -> ExpertBackend:
    context = BackendContext(ExpertLayout(EXPERTS, TOP_K, F), D, 0, dict)
    return REGISTRY.build(EXPERT_BACKENDS, {"name": name}, context, "here")


def config(name: str, *, bias: bool = False, layers: int = 2, **moe: Any) -> ModelConfig:
    """The first layer is dense, where there are two."""
    layout = {"name": "first_dense", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": F}
    layout |= {"first_k_dense_replace": layers - 1}
    parts: dict[str, Any] = {"layout": layout, "shared_expert": {"name": "plain", "intermediate_size": 12}, **moe}
    return ModelConfig(
        vocab_size=50, hidden_size=D, intermediate_size=20, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, activation={"name": name}, mlp_bias=bias,
        moe=MoEConfig(**parts),
    )  # fmt: skip


@pytest.mark.parametrize("name", BACKENDS)
def test_clamped_swiglu_with_biases_is_gpt_oss(name: str) -> None:
    """transformers' `GptOssExperts`, which keeps gate and up in turns and its matrices the other way."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    theirs = GptOssExperts(
        GptOssConfig(hidden_size=D, intermediate_size=F, num_local_experts=EXPERTS, num_hidden_layers=1)
    )
    theirs.config._experts_implementation = "eager"
    routing = skewed()
    bank = ExpertBank(ExpertLayout(EXPERTS, TOP_K, F), D, activation("clamped_swiglu"), bias=True)
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 2.0, generator=stream))
        bank.gate_up.copy_(torch.cat([theirs.gate_up_proj[..., i::2].mT for i in (0, 1)], 1))
        bank.down.copy_(theirs.down_proj)
        bank.gate_up_bias.copy_(torch.cat([theirs.gate_up_proj_bias[..., i::2] for i in (0, 1)], 1))
        bank.down_bias.copy_(theirs.down_proj_bias)
    x, head = torch.randn(2, routing.num_tokens, D, generator=stream).unbind(0)
    chosen, weight = routing.expert.view(-1, TOP_K), routing.weight.detach().view(-1, TOP_K)
    ours, expected = bank(x, routing, backend(name)), theirs(x, chosen, weight)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * scale)
    assert float((bank.activation(x * 20, x) - bank.activation(x * 21, x)).abs().min()) == 0.0  # it does clamp
    (ours * head).sum().backward()
    (expected * head).sum().backward()
    wanted = torch.cat([theirs.gate_up_proj.grad[..., i::2].mT for i in (0, 1)], 1)
    torch.testing.assert_close(bank.gate_up.grad, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    torch.testing.assert_close(bank.down_bias.grad, theirs.down_proj_bias.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("piece", [1, 24, 1 << 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clamped_swiglu_in_pieces_is_that_of_the_whole(
    piece: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values at the limit itself among them, which pass their gradient as autograd's clamp lets them."""
    act = activation("clamped_swiglu", swiglu_limit=0.7)
    monkeypatch.setattr(__import__(type(act).__module__, fromlist=["PIECE"]), "PIECE", piece)
    drawn = torch.randn(31, 2, F, generator=torch.Generator().manual_seed(2)).to(dtype)
    drawn[::3, :, ::2] = torch.tensor(0.7, dtype=dtype)
    joined, whole = (drawn.clone().requires_grad_() for _ in range(2))
    head = torch.randn(31, F, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = act.of_joined(joined)
    expected = act(*whole.double().unbind(1)) if dtype == torch.float32 else act(*whole.unbind(1))
    close = 1e-6 if dtype == torch.float32 else 2**-5
    torch.testing.assert_close(found.double(), expected.double(), rtol=close, atol=close)
    (found * head).sum().backward()
    (expected * head).sum().backward()
    torch.testing.assert_close(joined.grad, whole.grad, rtol=close, atol=close)


def test_situ_glu_is_swiglu_near_zero_and_bounded_far_out() -> None:
    """Kimi K3, 2.3: first order in the caps, and |y| <= 4 * 25."""
    situ, swiglu = activation("situ_glu"), activation("swiglu")
    gate, up = torch.randn(2, 50, dtype=torch.float64).unbind(0)
    torch.testing.assert_close(situ(1e-4 * gate, 1e-4 * up), swiglu(1e-4 * gate, 1e-4 * up), rtol=1e-6, atol=0)
    assert float(situ(1e4 * gate.abs(), 1e4 * up).abs().max()) == pytest.approx(100.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [False, True])
def test_dense_layers_shared_experts_and_experts_share_the_activation(name: str, bias: bool) -> None:
    """One expert that all tokens go to, a shared expert and a dense layer of the same weights: the same function."""
    act = activation(name)
    dense = MLP(D, F, act, bias).double()
    bank = ExpertBank(ExpertLayout(1, 1, F), D, act, bias=bias).double()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_()
        inner = [dense.gate_proj, dense.up_proj] if act.gated else [dense.up_proj]
        bank.gate_up[0] = torch.cat([part.weight for part in inner])
        bank.down[0] = dense.down_proj.weight.T
        if bias:
            bank.gate_up_bias[0] = torch.cat([part.bias for part in inner])
            bank.down_bias[0] = dense.down_proj.bias
    x = torch.randn(7, D)
    torch.testing.assert_close(bank.of_one(0, x.double()), dense(x.double()))
    model = build_model(config(name, bias=bias))
    parts = [model.layers[0].mlp, model.layers[1].mlp.shared_expert]
    for part in parts:
        assert hasattr(part, "gate_proj") == act.gated
        assert (part.down_proj.bias is not None) == bias
        pre = [part.gate_proj(x), part.up_proj(x)] if act.gated else [part.up_proj(x)]
        torch.testing.assert_close(part.hidden(x), act(*pre))
    assert model.layers[1].mlp.experts.activation.gated == act.gated


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_and_flops_by_hand(name: str, bias: bool) -> None:
    """A feed-forward part of width w at hidden size h: m h w weights, and with biases (m - 1) w + h more."""
    model = build_model(config(name, bias=bias), device="meta", seed=None)
    m = 3 if activation(name).gated else 2

    def part(width: int) -> int:
        return m * D * width + ((m - 1) * width + D) * bias

    attention, norms, router, table = 4 * D * D + 3 * D, 2 * D, 4 * D, 2 * 50 * D
    counted = count_parameters(model)
    assert counted.routed == 4 * part(F)
    assert counted.total == table + D + 2 * (attention + norms) + part(20) + router + part(12) + 4 * part(F)
    assert counted.active == counted.total - 2 * part(F)
    weights = 2 * 4 * D * D + m * D * (20 + 12 + 2 * F) + router + 50 * D
    assert forward_flops_per_token(model, 64) == 2 * weights + 2 * 2 * 64 * D
    assert served_costs(model, 64).expert_weights == (m * D * F,) * 4


@pytest.mark.parametrize("limit", [7.0, 1.2, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_clamped_has_no_gradient_and_the_limit_itself_has_one(dtype: torch.dtype, limit: float) -> None:
    """Wherever autograd's clamp lets a gradient through, its own backward does: among the numbers next to a limit."""
    act: Any = activation("clamped_swiglu", swiglu_limit=limit)
    near = torch.tensor([limit, -limit, 0.5 * limit, 9.0 * limit, -9.0 * limit], dtype=torch.float64).to(dtype)
    beside = [torch.nextafter(near, torch.full_like(near, end)) for end in (torch.inf, -torch.inf)]
    values = torch.cat([near, *beside])
    gate, up = (v.contiguous().requires_grad_() for v in torch.meshgrid(values, values, indexing="ij"))
    (expected_gate, expected_up) = torch.autograd.grad(act(gate, up).sum(), (gate, up))
    with torch.no_grad():
        result, pullback = act.differentiate(gate, up)
        found = [torch.empty_like(gate), torch.empty_like(up)]
        pullback(torch.ones_like(result), *found)
        assert torch.equal(result, act(gate, up))
    for mine, theirs in zip(found, (expected_gate, expected_up), strict=True):
        assert torch.equal(mine != 0, theirs != 0)
        torch.testing.assert_close(mine, theirs, rtol=0.05 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


@pytest.mark.parametrize("name", ["gelu", "clamped_swiglu"])
def test_narrow_experts_keep_their_width_while_they_learn(name: str) -> None:
    """Neurons beyond an expert's own width stay zero, and so does their bias."""
    layout = {"name": "heterogeneous", "num_experts": 4, "num_experts_per_tok": 2, "widths": [4, 8, 4, 8]}
    model = build_model(config(name, bias=True, layers=1, layout=layout))
    optimizer = build_adamw(model, _optimizer())
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model(ids, targets=ids).token_loss.mean().backward()
        optimizer.step()
    bank = model.layers[0].mlp.experts
    for tensor in (bank.gate_up, bank.gate_up_bias):
        beyond = tensor.detach().unflatten(1, (-1, 8))[[0, 2]][:, :, 4:]
        assert not bool(beyond.any())
        assert bool(tensor.detach().any())
    assert not bool(bank.down.detach()[[0, 2], 4:].any())


def test_biases_of_experts_start_at_zero_and_do_not_decay() -> None:
    model = build_model(config("relu", bias=True))
    bank = model.layers[1].mlp.experts
    assert not bool(bank.gate_up_bias.any())
    assert not bool(bank.down_bias.any())
    groups = [group for group in build_adamw(model, _optimizer()).param_groups if group["weight_decay"]]
    decaying = {id(parameter) for group in groups for parameter in group["params"]}
    assert id(bank.gate_up) in decaying
    assert not decaying & {id(bank.gate_up_bias), id(bank.down_bias)}


def _optimizer() -> Any:
    from moelab.config.run import OptimizerConfig

    return OptimizerConfig(weight_decay=0.1)


def test_a_gate_of_its_own_for_each_shared_expert_has_no_place_for_biases() -> None:
    shared = {"name": "several", "num_experts": 2, "intermediate_size": 4, "gated": True}
    with pytest.raises(ConfigError, match="mlp_bias"):
        build_model(config("relu", bias=True, shared_expert=shared))


PLANTED = """
from dataclasses import dataclass

import moelab


@dataclass
class Options:
    pass


class Adds:
    gated = "yes"

    def __init__(self, options, context):
        pass

    def __call__(self, gate, up):
        return gate + up


@moelab.hookimpl
def moelab_activations():
    return [moelab.component("adds", Options, Adds)]
"""


def test_a_plugin_that_is_no_activation_is_told_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lab_of_sums.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"model.activation: activation 'adds' of lab_of_sums, layer 0: has no `gated`"):
        build_model(config("adds"), Registry(["lab_of_sums"], entry_points=False))


def test_layers_of_every_activation_learn() -> None:
    """All parameters of a block get a gradient, biases too."""
    for name in NAMES:
        model = build_model(config(name, bias=True))
        ids = torch.arange(32).view(2, 16)
        model(ids, targets=ids).token_loss.mean().backward()
        block = model.layers[1].mlp
        assert isinstance(block, MoEBlock)
        still = [key for key, parameter in block.named_parameters() if not bool(parameter.grad.any())]
        assert not still, (name, still)


def test_gelu_keeps_no_kernel_for_each_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's is one for each shape, and those of experts are ever new."""
    asked: list[bool] = []
    plain = torch.nn.functional.gelu

    def gelu(*arguments: Any, **options: Any) -> torch.Tensor:
        asked.append(torch.backends.mkldnn.enabled)
        return plain(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "gelu", gelu)
    before = torch.backends.mkldnn.enabled
    built, x = activation("gelu"), torch.randn(5, 8)
    torch.testing.assert_close(built(x), x * 0.5 * (1 + torch.erf(x / 2**0.5)))
    built.differentiate(x)
    assert asked == [False, False]
    assert torch.backends.mkldnn.enabled == before
