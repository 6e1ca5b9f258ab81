"""What says that it is exact is exact, in float64, and its moments are those of the gradients that follow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moelab.moe.surgery import Scores
from moelab.surgery.tensors import FIRST, SECOND
from operated_models import LAYOUT, Operated, config_of, operate, tokens

BOTH = [
    {"name": "softmax_topk", "norm_topk_prob": False},
    {"name": "softmax_topk", "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    {"name": "softmax_topk", "topk_first": True},
    {"name": "softmax_topk", "balance": "bias"},
    {"name": "softmax_topk", "n_group": 2, "topk_group": 1},
    {"name": "sigmoid_topk", "norm_topk_prob": True},
    {"name": "sigmoid_topk", "norm_topk_prob": False},
    {"name": "sqrtsoftplus_topk", "norm_topk_prob": False, "balance": "none"},
    {"name": "noisy_topk", "zero_init": False},
    {"name": "mixture_of_depths", "capacity": 0.5},
    {"name": "token_rounding", "tile": 2},
    {"name": "sinkhorn"},
    {"name": "remoe"},
    {"name": "expert_choice"},
    {"name": "softmax_topk", "eval_capacity_factor": 1.0},  # the heaviest of equals are the same
]
SURGERIES = {
    "split": {"name": "split", "parts": 2},
    "split at random": {"name": "split", "parts": 4, "order": "random"},
    "grow": {"name": "grow", "num_experts": 18, "num_experts_per_tok": 6},
}
NOT_ENOUGH = [
    {"name": "top_p"},
    {"name": "null_experts"},
    {"name": "expert_choice", "max_experts_per_token": 3},
    {"name": "sigmoid_topk", "n_group": 2, "topk_group": 2},  # which scores a group by its two best
    {"name": "softmax_topk", "eval_capacity_factor": 1.0, "drop_policy": "position"},  # equals have no first
]


def _gap(operated: Operated) -> float:
    with torch.no_grad():
        before, after = (model(tokens()).logits for model in (operated.before, operated.after))
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize("surgery", SURGERIES)
@pytest.mark.parametrize("router", BOTH, ids=lambda r: "-".join(map(str, r.values())))
def test_the_function_stays_to_the_rounding_of_float64(router: dict[str, Any], surgery: str) -> None:
    operated = operate(config_of(router), SURGERIES[surgery])
    assert all(one.plan.exact for one in operated.layers.values())
    assert _gap(operated) < 1e-12


@pytest.mark.parametrize("router", NOT_ENOUGH, ids=lambda r: r["name"])
def test_a_router_for_which_equal_rows_mean_something_else_promises_nothing(router: dict[str, Any]) -> None:
    plans = [one.plan for one in operate(config_of(router), SURGERIES["split"]).layers.values()]
    assert not any(plan.exact for plan in plans)
    assert all("does not say" in plan.because for plan in plans)


@pytest.mark.parametrize(
    "node",
    [
        {"name": "split", "num_experts_per_tok": 3},
        {"name": "grow", "num_experts": 12},
        {"name": "grow", "num_experts": 9, "num_experts_per_tok": 3},
        {"name": "grow", "num_experts": 12, "num_experts_per_tok": 4, "row_noise": 0.1},
        {"name": "prune", "experts": [0]},
        {"name": "top_k", "num_experts_per_tok": 3},
    ],
)
def test_what_changes_the_function_does_not_say_that_it_stays(node: dict[str, Any]) -> None:
    operated = operate(config_of(BOTH[0]), node)
    assert not any(one.plan.exact for one in operated.layers.values())
    assert _gap(operated) > 1e-6


@pytest.mark.parametrize("surgery", SURGERIES)
@pytest.mark.parametrize("router", [BOTH[0], BOTH[1], BOTH[5], BOTH[6]], ids=lambda r: "-".join(map(str, r.values())))
def test_moments_become_those_of_the_gradients_that_follow(router: dict[str, Any], surgery: str) -> None:
    """The rule for exp_avg, applied to the old gradient itself, gives the new one; that for exp_avg_sq its square."""
    operated = operate(config_of(router), SURGERIES[surgery])
    old, new = operated.gradients()
    for name in ("layers.0.mlp.experts.gate_up", "layers.0.mlp.experts.down"):
        torch.testing.assert_close(operated.made(name, old[name], FIRST), new[name], rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(operated.made(name, old[name] ** 2, SECOND), new[name] ** 2, rtol=1e-9, atol=1e-20)
    copies = len(operated.layers[0].plan.experts) // LAYOUT["num_experts"]
    name = "layers.0.mlp.router.weight"
    summed = new[name].view(LAYOUT["num_experts"], copies, -1).sum(1)
    torch.testing.assert_close(summed, old[name], rtol=1e-9, atol=1e-14)
    made = operated.made(name, old[name], FIRST)
    torch.testing.assert_close(made, (old[name] / copies).repeat_interleave(copies, 0))
    if surgery == "grow":  # whose copies are alike
        torch.testing.assert_close(made, new[name], rtol=1e-9, atol=1e-14)


def test_a_merge_of_copies_undoes_growing() -> None:
    """Equal neurons and rows, and K divided by as many: the first model again."""
    grown = operate(config_of(BOTH[0]), SURGERIES["grow"])
    node = {"name": "merge", "num_experts": 6, "num_experts_per_tok": 2, "by": "weights"}
    scores = {layer: Scores(1, load=np.ones(18)) for layer in (0, 1)}
    merged = operate(grown.after.config, node, scores, grown.after).after.state_dict()
    for name, tensor in grown.before.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-12, atol=1e-15)
