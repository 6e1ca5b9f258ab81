"""A whole MoE layer of gpt-oss against transformers' own: biased router, clamped SwiGLU, experts with biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moelab import Registry
from moelab.builder import build_model
from moelab.config.load import load_config
from moelab.config.run import RunConfig
from moelab.testing.tensors import make_info
from parity.test_routers import strengthen, theirs

REGISTRY = Registry(entry_points=False)
HIDDEN, EXPERTS, WIDTH, TOP_K, VOCABULARY, TOKENS = 16, 8, 12, 3, 64, 48


def scaled_down(backend: str, dtype: torch.dtype) -> Any:
    """The layer that configs/moe/gpt_oss.yaml builds, of smaller sizes."""
    layout = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": WIDTH}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    words = [f"model.{key}={value}" for key, value in (sizes | heads).items()]
    words += [f"model.moe.layout.{key}={value}" for key, value in layout.items()]
    words += [f"model.moe.backend.name={backend}", "run_dir=unused", "train.steps=1"]
    config = load_config(["moe/gpt_oss", *words], RunConfig).config
    return build_model(config.model, REGISTRY).layers[0].mlp.to(dtype).train()


def turned(both: Tensor) -> Tensor:
    """gate and up in turns along the last axis, [E, D, 2 F] or [E, 2 F] -> gate, then up, as a bank has them."""
    found = torch.cat([both[..., start::2] for start in (0, 1)], -1)
    return found.mT if both.ndim == 3 else found


def assert_near(ours: Tensor | None, wanted: Any, close: float, name: str) -> None:
    """To a share of the largest number."""
    assert ours is not None, name
    assert float((ours - wanted).detach().abs().max()) <= close * float(wanted.detach().abs().max()), name


@pytest.mark.parametrize(
    ("backend", "dtype", "close"),
    [
        ("loop", torch.float64, 1e-6),  # routers compute in fp32
        ("batched", torch.float64, 1e-6),
        ("auto", torch.float64, 1e-6),
        ("grouped_mm", torch.float32, 1e-4),  # which takes no float64
    ],
)
def test_the_layer_of_the_recipe_is_transformers_with_its_gradients(
    backend: str, dtype: torch.dtype, close: float
) -> None:
    modeling, configuration = theirs("gpt_oss")
    config = configuration.GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "eager"
    reference = modeling.GptOssMLP(config).to(dtype)
    strengthen(reference)
    experts, ours = reference.experts, scaled_down(backend, dtype)
    pairs = {
        "router.weight": reference.router.weight,
        "router.gate_bias": reference.router.bias,
        "experts.gate_up": experts.gate_up_proj,
        "experts.gate_up_bias": experts.gate_up_proj_bias,
        "experts.down": experts.down_proj,
        "experts.down_bias": experts.down_proj_bias,
    }
    own = dict(ours.named_parameters())
    assert own.keys() == pairs.keys()

    def as_ours(name: str, tensor: Tensor) -> Tensor:
        return turned(tensor) if "gate_up" in name else tensor

    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(as_ours(name, pairs[name]))
    stream = torch.Generator().manual_seed(1)
    x, head = torch.empty(2, TOKENS, HIDDEN, dtype=dtype).normal_(0.0, 4.0, generator=stream).unbind(0)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    y, _ = ours(inputs[0], make_info(2, TOKENS // 2, VOCABULARY, training=True))
    expected = reference(inputs[1].unsqueeze(0))[0].squeeze(0)
    clamped = torch.einsum("td,edf->tef", x, experts.gate_up_proj.detach()).abs() > experts.limit
    assert bool(clamped.any())  # the limit is met
    assert_near(y, expected, close, "y")
    (y * head).sum().backward()
    (expected * head).sum().backward()
    assert_near(inputs[0].grad, inputs[1].grad, close, "x")
    for name, parameter in own.items():
        assert_near(parameter.grad, as_ours(name, pairs[name].grad), close, name)
