"""An optimizer for another trainer: names of the model itself, noise that changes, a rate that is kept to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.core.training.test_rounded import model_of
from torch import nn

import moelab
from moelab import ConfigError, session
from moelab.config.run import OptimizerConfig
from moelab.nn.optimizing import each


class Scored(nn.Module):
    """A model within something else, with a head of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.score = model, nn.Linear(32, 1)


def test_parameters_are_called_as_in_the_model_and_rates_are_kept_by_a_schedule() -> None:
    scored = Scored(model_of())
    settings = {"lr": "1e-3", "learning_rates": {"layers.*": 0.5}, "algorithm": {"name": "muon"}}
    optimizer = moelab.optimizer_for(scored, settings)
    found = {name: group["lr"] for group, name, _ in each(optimizer)}
    assert found["layers.0.mlp.experts.down"] == 0.5e-3 and found["score.weight"] == 1e-3
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
    optimizer.step()
    schedule.step()
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.5e-4, 1e-4])
    router = [group["muon"] for group, name, _ in each(optimizer) if ".router." in name]
    assert router and not any(router)


def test_noise_is_another_one_in_each_step_without_anyone_seeding() -> None:
    """Two steps of equal size from 1, rounded: were the noise the same, they would round the same way."""
    model = model_of()
    name = "layers.0.mlp.experts.down"
    model.get_parameter(name).data = torch.ones_like(model.get_parameter(name)).bfloat16()
    moved = []
    optimizer = moelab.optimizer_for(model, OptimizerConfig(lr=1e-3, weight_decay=0.0))
    for _ in range(2):
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.fill_(1.0)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved.append(parameter.detach().clone())
    assert not torch.equal(*moved)


def test_online_merging_reads_tau_from_runs_and_refuses_others(tmp_path: Path) -> None:
    words = ["train/tiny_moe", "train.steps=1", "train.batch_size=1", "train.sequence_length=16", "observers=[]"]
    words += ["data.source.domains=[code_py]", "data.source.max_bytes_per_domain=20000", "evaluation.sequences=1"]
    for number, name in enumerate(("base", "reference")):
        config = moelab.load_config(*words, f"run_dir={tmp_path / name}", f"seed={number}")
        session.train(config, progress=False)
    model = moelab.load(tmp_path / "reference")
    folders = {"reference": str(tmp_path / "reference"), "before": str(tmp_path / "base")}
    algorithm = {"name": "online_merging", "alpha": 1e-3, **folders}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = moelab.optimizer_for(model, {"lr": 1e-3, "algorithm": algorithm})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    base = dict(moelab.load(tmp_path / "base").named_parameters())
    for name, parameter in model.named_parameters():
        tau = (before[name] - base[name]).clamp(-1, 1) * (0 if ".router." in name else 1e-3)
        decay = 1 - 1e-4 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * decay + tau.detach(), rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match=r"optimizer.algorithm.reference: .* is another model"):
        moelab.optimizer_for(model_of(), {"algorithm": algorithm})


def test_what_holds_no_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no model of moelab"):
        moelab.optimizer_for(nn.Linear(2, 2), {"lr": 1e-3})
    with pytest.raises(ConfigError, match=r"optimizer.lr: must be positive, not -1.0"):
        moelab.optimizer_for(model_of(), {"lr": -1})
    with pytest.raises(ConfigError, match=r"optimizer.rate: no such key"):
        moelab.optimizer_for(model_of(), {"rate": 1})
    frozen = model_of().requires_grad_(False)
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        moelab.optimizer_for(frozen, {})
