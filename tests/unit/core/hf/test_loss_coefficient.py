"""The router_aux_loss_coef of an export is the run's, in transformers' convention."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from moelab import BalanceContext, Registry
from moelab.builder import build_balance_losses, build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.hf.loss_coefficient import aux_loss_fields
from moelab.hf.save import save_hf
from moelab.hf.write_config import write_config


def config(losses: list[dict[str, Any]], layers: int = 3, top_k: int = 4, **layout: Any) -> ModelConfig:
    sizes = {"name": "uniform", "num_experts": 8, "num_experts_per_tok": top_k, "moe_intermediate_size": 16} | layout
    moe = MoEConfig(
        layout=sizes, router={"name": "softmax_topk"}, balance_losses=losses,
        shared_expert={"name": "gated", "intermediate_size": 24},
    )  # fmt: skip
    return ModelConfig(64, 32, 48, layers, 4, 2, moe=moe, initializer_range=0.3)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], 0.0),
        ([{"name": "hf_load_balance", "weight": 0.02}], 0.02),
        ([{"name": "load_balance", "weight": 0.008}], 0.002),  # K = 4
        ([{"name": "load_balance", "weight": 0.008, "scope": "micro"}], 0.002),
        ([{"name": "load_balance", "weight": 0.005, "convention": "huggingface"}], 0.005),
        ([{"name": "load_balance", "weight": 0.004, "convention": "mesh"}], 0.003),  # 3 layers, K = 4
        ([{"name": "load_balance", "weight": 0.008}, {"name": "hf_load_balance", "weight": 0.01}], 0.012),
        ([{"name": "load_balance", "weight": 0.008, "layers": "0-"}], 0.002),
    ],
)
def test_what_can_be_said_is_converted(
    losses: list[dict[str, Any]], expected: float, caplog: pytest.LogCaptureFixture
) -> None:
    assert aux_loss_fields(config(losses)) == {"router_aux_loss_coef": pytest.approx(expected)}
    assert not caplog.messages


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ({"name": "load_balance", "scope": "sequence"}, "its scope is sequence"),
        ({"name": "load_balance", "scope": "device"}, "its scope is device"),
        ({"name": "load_balance", "layers": "1"}, "not on all layers"),
        ({"name": "load_balance", "schedule": {"warmup_steps": 5}}, "follows a schedule"),
        ({"name": "router_z"}, "no such loss"),
        ({"name": "somebodys_own"}, "no balance loss 'somebodys_own'"),
    ],
)
def test_what_can_not_be_said_is_zero_and_told(
    loss: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="moelab"):
        assert aux_loss_fields(config([loss])) == {"router_aux_loss_coef": 0.0}
    (message,) = caplog.messages
    assert reason in message
    assert "router_aux_loss_coef" in message


def test_transformers_adds_what_the_run_added(tmp_path: Path) -> None:
    """The same model and text, one layer, so that pooling changes nothing: coefficient times value agree."""
    from transformers import Qwen2MoeForCausalLM

    settings = config([{"name": "load_balance", "weight": 0.03, "scope": "global"}], layers=1)
    model = build_model(settings, Registry(entry_points=False), seed=2).eval()
    save_hf(model, tmp_path / "exported", dtype=torch.float32)
    theirs = Qwen2MoeForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    (loss,) = build_balance_losses(settings, Registry(entry_points=False))
    with torch.no_grad():
        added = loss.weight_at(0) * float(loss(model(ids).records, BalanceContext(None)))
        output = theirs(ids, output_router_logits=True)
    assert theirs.config.router_aux_loss_coef == pytest.approx(0.0075)
    assert theirs.config.router_aux_loss_coef * float(output.aux_loss) == pytest.approx(added, rel=1e-4)


def test_a_given_coefficient_wins() -> None:
    model = build_model(config([{"name": "load_balance"}]), Registry(entry_points=False))
    assert write_config(model, extra={"router_aux_loss_coef": 0.5})["router_aux_loss_coef"] == 0.5
