"""What goes on beside the model: the state of a balance loss under its own names, or a word of what is amiss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moelab
from moelab.builder import build_balance_losses
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import OptimizerConfig
from moelab.errors import CheckpointError
from moelab.registry import Registry
from moelab.training.checkpoint import TrainingState, restore_checkpoint, save_checkpoint
from moelab.training.optimizer import build_adamw

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64,
    moe=MoEConfig(
        layout={"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        router={"name": "remoe"},
        balance_losses=[{"name": "remoe_l1"}],  # whose weight moves from step to step
    ),
)  # fmt: skip
KEY = "balance_losses/remoe_l1/weight"
Tensors = dict[str, torch.Tensor]


def _saved(folder: Path) -> tuple[moelab.nn.transformer.Transformer, TrainingState]:
    model = moelab.build(CONFIG)
    losses = build_balance_losses(CONFIG, Registry(entry_points=False))
    training = TrainingState(build_adamw(model, OptimizerConfig()), losses)
    save_checkpoint(folder, model, training, {"step": 1}, {"config.yaml": b""})
    return model, training


def test_the_state_of_a_balance_loss_goes_on(tmp_path: Path) -> None:
    model, training = _saved(tmp_path / "step")
    loss = training.balance_losses[0].loss
    before, loss.weight = loss.weight, 7.0
    assert restore_checkpoint(tmp_path / "step", model, training)["step"] == 1
    assert loss.weight == before


def _lost(tensors: Tensors) -> None:
    del tensors[KEY]


def _renamed(tensors: Tensors) -> None:
    tensors["balance_losses/remoe_l2/weight"] = tensors.pop(KEY)


def _stray(tensors: Tensors) -> None:
    tensors["nobody"] = torch.zeros(1)


def _many(tensors: Tensors) -> None:
    tensors[KEY] = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_lost, f"lacks {KEY}"),
        (_renamed, "holds 'balance_losses/remoe_l2/weight', which nothing of this run keeps"),
        (_stray, "holds 'nobody'"),
        (_many, "balance loss 'remoe_l1' can't go on from its state there"),
    ],
)
def test_a_balance_loss_that_finds_another_state_says_so(
    tmp_path: Path, change: Callable[[Tensors], None], said: str
) -> None:
    model, training = _saved(tmp_path / "step")
    path = tmp_path / "step" / "training.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=said):
        restore_checkpoint(tmp_path / "step", model, training)
