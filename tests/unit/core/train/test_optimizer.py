"""AdamW's decay groups and its state as named tensors."""

from __future__ import annotations

import torch

import moelab
from moelab.config.model import ModelConfig
from moelab.config.run import OptimizerConfig
from moelab.train.optimizer import build_adamw, optimizer_tensors, restore_optimizer

SMALL = ModelConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=True,
)  # fmt: skip


def test_matrices_decay_and_vectors_do_not() -> None:
    model = moelab.build(SMALL)
    decayed = {id(p) for p in build_adamw(model, OptimizerConfig()).param_groups[0]["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (not name.endswith("bias") and "norm" not in name), name


def test_each_parameter_is_updated_once_though_the_head_is_tied() -> None:
    model = moelab.build(SMALL)
    groups = build_adamw(model, OptimizerConfig()).param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(p.numel() for p in model.parameters())


def test_state_survives_the_way_through_named_tensors() -> None:
    model, twin = moelab.build(SMALL), moelab.build(SMALL)
    first, second = build_adamw(model, OptimizerConfig()), build_adamw(twin, OptimizerConfig())
    ids = torch.arange(8)[None]
    for _ in range(2):
        model(ids, targets=ids).token_loss.sum().backward()
        first.step()
    twin.load_state_dict(model.state_dict())
    restore_optimizer(twin, second, optimizer_tensors(model, first))
    for m, o in ((model, first), (twin, second)):
        o.zero_grad()
        m(ids, targets=ids).token_loss.sum().backward()
        o.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
