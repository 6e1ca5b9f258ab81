"""Routers of late 2026 against transformers' own, on the same weights: experts, weights, and whole layers."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from moelab import Registry
from moelab.builder import build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.moe.block import MoEBlock
from moelab.testing.tensors import dense_weights, make_info

REGISTRY = Registry(entry_points=False)
HIDDEN, EXPERTS, WIDTH, VOCABULARY, TOKENS = 16, 8, 12, 64, 48
INFO = make_info(2, TOKENS // 2, VOCABULARY, training=True)


def theirs(model: str) -> tuple[Any, Any]:
    """transformers' modules of modelling and configuration; a skip where it is too old to have them."""
    parts = ("modeling", "configuration")
    names = [f"transformers.models.{model}.{part}_{model}" for part in parts]
    try:
        modeling, configuration = (importlib.import_module(name) for name in names)
    except ImportError:
        pytest.skip(f"this transformers has no {model}")
    return modeling, configuration


def block(top_k: int, router: dict[str, Any], **more: Any) -> MoEBlock:
    layout = {
        "name": "uniform", "num_experts": EXPERTS, "num_experts_per_tok": top_k, "moe_intermediate_size": WIDTH,
    }  # fmt: skip
    moe = MoEConfig(layout=layout, router=router, **more)
    model = build_model(ModelConfig(VOCABULARY, HIDDEN, WIDTH, 1, 4, 2, moe=moe), REGISTRY)
    found = model.layers[0].mlp
    assert isinstance(found, MoEBlock)
    return found.train()


def tokens() -> Tensor:
    return torch.empty(TOKENS, HIDDEN).normal_(generator=torch.Generator().manual_seed(1))


def strengthen(module: torch.nn.Module) -> None:
    """Weights as large as what they weigh, so that experts differ."""
    stream = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in [*module.parameters(), *(b for n, b in module.named_buffers() if n.endswith("bias"))]:
            tensor.copy_(torch.empty(tensor.shape).normal_(0.0, 0.3, generator=stream))


def spread(index: Tensor, weight: Tensor) -> Tensor:
    """index, weight [T, K] -> [T, E]."""
    return torch.zeros(len(index), EXPERTS).scatter_add(1, index, weight)


@torch.no_grad()
def test_top_k_of_biased_logits_then_softmax_is_the_router_of_gpt_oss() -> None:
    modeling, configuration = theirs("gpt_oss")
    config = configuration.GptOssConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=2)
    reference = modeling.GptOssTopKRouter(config)
    strengthen(reference)
    router: Any = block(2, {"name": "softmax_topk", "topk_first": True, "gate_bias": True}).router
    router.weight.copy_(reference.weight)
    router.gate_bias.copy_(reference.bias)
    logits, weight, index = reference(tokens())
    if weight.shape[1] == EXPERTS:  # 4.57 returns (weights [T, E], index)
        logits, weight, index = None, logits.gather(1, weight.long()), weight
    routing = router(tokens(), INFO)
    torch.testing.assert_close(dense_weights(routing), spread(index, weight))


def test_weights_on_the_input_are_the_experts_of_llama_4() -> None:
    """The whole layer, shared expert included, and the gradients of router, experts and input."""
    modeling, configuration = theirs("llama4")
    config = configuration.Llama4TextConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=2
    )
    reference = modeling.Llama4TextMoe(config)
    strengthen(reference)
    router = {"name": "sigmoid_topk", "norm_topk_prob": False, "balance": "none", "weights_on": "input"}
    for backend in ("loop", "batched", "auto"):
        ours = block(2, router, shared_expert={"name": "plain", "intermediate_size": WIDTH}, backend={"name": backend})
        with torch.no_grad():
            ours.router.weight.copy_(reference.router.weight)  # type: ignore[union-attr]
            ours.experts.gate_up.copy_(reference.experts.gate_up_proj.transpose(1, 2))
            ours.experts.down.copy_(reference.experts.down_proj)
            for name, parameter in ours.shared_expert.named_parameters():  # type: ignore[union-attr]
                parameter.copy_(reference.shared_expert.get_parameter(name.removeprefix("expert.")))
        x, other = tokens().requires_grad_(), tokens().requires_grad_()
        found, wanted = ours(x, INFO)[0], reference(other.unsqueeze(0))[0].view(TOKENS, HIDDEN)
        torch.testing.assert_close(found, wanted)
        reference.zero_grad()
        for y in (found, wanted):
            (y * torch.linspace(-1, 1, HIDDEN)).sum().backward()
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)
        gradient = ours.router.weight.grad  # type: ignore[union-attr]
        torch.testing.assert_close(gradient, reference.router.weight.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.experts.down.grad, reference.experts.down_proj.grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("table", [False, True])
def test_sqrtsoftplus_with_and_without_a_table_is_the_router_of_deepseek_v4(table: bool) -> None:
    modeling, configuration = theirs("deepseek_v4")
    config = configuration.DeepseekV4Config(
        hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=2, vocab_size=VOCABULARY, num_hidden_layers=4
    )
    reference = (modeling.DeepseekV4HashRouter if table else modeling.DeepseekV4TopKRouter)(config)
    strengthen(reference)
    options = {"token_table": {"seed": 3}, "balance": "none"} if table else {"balance": "bias"}
    router: Any = block(2, {"name": "sqrtsoftplus_topk", "routed_scaling_factor": 1.5, **options}).router
    router.weight.copy_(reference.weight)
    if table:
        reference.tid2eid.copy_(router.table)
    else:
        router.bias.copy_(reference.e_score_correction_bias)
    routing = router(tokens(), INFO)
    ids = [INFO.token_id] if table else []
    _, weight, index = reference(tokens(), *ids)
    torch.testing.assert_close(dense_weights(routing), spread(index, weight))


@torch.no_grad()
def test_null_experts_that_copy_are_the_layer_of_longcat() -> None:
    modeling, configuration = theirs("longcat_flash")
    config = configuration.LongcatFlashConfig(
        hidden_size=HIDDEN, n_routed_experts=EXPERTS, moe_topk=3, zero_expert_num=4, expert_ffn_hidden_size=WIDTH
    )
    reference = modeling.LongcatFlashMoE(config)
    strengthen(reference)
    router = {
        "name": "null_experts", "num_null_experts": 4, "null_output": "copy", "norm_topk_prob": False,
        "routed_scaling_factor": 6.0, "balance": "proportional", "target_experts": 2.0,
    }  # fmt: skip
    ours = block(3, router)
    gate: Any = ours.router
    gate.weight.copy_(reference.router.classifier.weight)
    gate.bias.copy_(reference.router.e_score_correction_bias)
    ours.experts.gate_up.copy_(reference.experts.gate_up_proj[:EXPERTS])
    ours.experts.down.copy_(reference.experts.down_proj.transpose(1, 2))
    torch.testing.assert_close(ours(tokens(), INFO)[0], reference(tokens()), rtol=1e-4, atol=1e-5)
