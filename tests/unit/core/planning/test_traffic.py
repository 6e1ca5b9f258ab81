"""What a device sends, from sizes and declarations alone."""

from __future__ import annotations

from typing import Any

import pytest

from moelab.builder import build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.planning.traffic import Problem, communication, model_sizes


@pytest.mark.parametrize(
    ("router", "experts"),
    [
        ({"name": "softmax_topk"}, 2),
        ({"name": "null_experts", "num_null_experts": 8}, 1),
        ({"name": "mixture_of_depths", "capacity": 0.25}, 0.5),
    ],
)
def test_tokens_go_to_as_many_experts_as_the_routers_declare(router: dict[str, Any], experts: float) -> None:
    """Two layers; there and back, forward and backward; three quarters of 4 x 32 tokens leave their device."""
    layout = {"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    moe = MoEConfig(layout=layout, router=router, allow_noncausal=True)
    model = build_model(ModelConfig(64, 16, 32, 2, 2, 1, moe=moe), device="meta", seed=None)
    sent = communication(model, model_sizes(model), Problem(4, 32, devices=4, expert_parallel=4))
    assert sent.exchange_tokens == 4 * (2 * 4 * 32 * experts * 16) * 4 * 3 / 4
