"""AdamW's decay groups and its state as named tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moelab
from moelab.checkpoint import TRAINING, stored_tensors
from moelab.config.model import ModelConfig
from moelab.config.run import OptimizerConfig
from moelab.errors import CheckpointError, ConfigError
from moelab.nn.optimizing import trained_parameters
from moelab.tensor_file import write_tensors
from moelab.tensor_parts import Stored
from moelab.training.optimizer import (
    build_adamw,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
)

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


def on_disk(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, Stored]:
    write_tensors(folder / TRAINING, tensors)
    return stored_tensors(folder, TRAINING)


def test_state_survives_the_way_through_named_tensors(tmp_path: Path) -> None:
    model, twin = moelab.build(SMALL), moelab.build(SMALL)
    first, second = build_adamw(model, OptimizerConfig()), build_adamw(twin, OptimizerConfig())
    ids = torch.arange(8)[None]
    for _ in range(2):
        model(ids, targets=ids).token_loss.sum().backward()
        first.step()
    twin.load_state_dict(model.state_dict())
    restore_optimizer(twin, second, on_disk(optimizer_tensors(model, first), tmp_path))
    for m, o in ((model, first), (twin, second)):
        o.zero_grad()
        m(ids, targets=ids).token_loss.sum().backward()
        o.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def _stepped() -> tuple[moelab.nn.transformer.Transformer, dict[str, torch.Tensor]]:
    model = moelab.build(SMALL)
    optimizer = build_adamw(model, OptimizerConfig())
    ids = torch.arange(8)[None]
    model(ids, targets=ids).token_loss.sum().backward()
    optimizer.step()
    return model, optimizer_tensors(model, optimizer)


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight/exp_avf"] = tensors.pop("norm.weight/exp_avg")


def _foreign(tensors: dict[str, torch.Tensor]) -> None:
    tensors["nprm.weight/exp_avg"] = tensors.pop("norm.weight/exp_avg")


def _lack(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["norm.weight/step"]


def _beside(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight/max_exp_avg_sq"] = tensors["norm.weight/exp_avg"]


def _scalar(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight/exp_avg"] = torch.tensor(0.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_rename, r"'norm.weight' lacks \['exp_avg'\] and holds \['exp_avf'\]"),
        (_foreign, "'nprm.weight', which this model does not train"),
        (_lack, r"'norm.weight' lacks \['step'\]"),
        (_beside, r"lacks \[\] and holds \['max_exp_avg_sq'\] beside"),
        (_scalar, r"'norm.weight/exp_avg' is \[\], not \["),
    ],
)
def test_moments_under_other_names_are_refused_and_the_parameter_named(
    change: Callable[[dict[str, torch.Tensor]], None], said: str, tmp_path: Path
) -> None:
    model, tensors = _stepped()
    change(tensors)
    optimizer = build_adamw(model, OptimizerConfig())
    with pytest.raises(CheckpointError, match=said):
        restore_optimizer(model, optimizer, on_disk(tensors, tmp_path))
    assert not optimizer.state


def test_a_parameter_without_moments_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tensors = _stepped()
    kept = {name: value for name, value in tensors.items() if not name.startswith("norm.weight/")}
    with caplog.at_level(logging.WARNING, logger="moelab"):
        restore_optimizer(model, build_adamw(model, OptimizerConfig()), on_disk(kept, tmp_path))
    assert "no optimizer state of norm.weight" in caplog.text


def test_a_parameters_rate_is_the_runs_times_its_factor() -> None:
    """Without decay a step moves a parameter by the rate times what the moments say, so by its factor times as far."""
    moved = {}
    for patterns in ({}, {"layers.*": 0.5, "*.mlp.*": 0.25, "embed_tokens.weight": 2.0}):
        model = moelab.build(SMALL).double()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = build_adamw(model, OptimizerConfig(weight_decay=0.0, learning_rates=patterns))
        set_learning_rate(optimizer, 1e-3)
        ids = torch.arange(8)[None]
        model(ids, targets=ids).token_loss.sum().backward()
        optimizer.step()
        moved[len(patterns)] = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    for name, plain in moved[0].items():
        factor = 0.25 if ".mlp." in name else 0.5 if name.startswith("layers.") else 2.0 if "embed" in name else 1.0
        torch.testing.assert_close(moved[3][name], factor * plain, rtol=1e-9, atol=1e-15)


def test_a_tied_matrix_is_found_under_both_its_names() -> None:
    model = moelab.build(SMALL)
    found = {one.name: one.factor for one in trained_parameters(model, {"lm_head.weight": 3.0}) if one.factor != 1}
    assert found == {"embed_tokens.weight": 3.0}


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.learning_rates: '\*.rooter.\*' matches no parameter"):
        build_adamw(moelab.build(SMALL), OptimizerConfig(learning_rates={"*.rooter.*": 0.1}))
