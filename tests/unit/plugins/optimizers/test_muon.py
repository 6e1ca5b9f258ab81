"""Muon beside torch's own, beside Newton-Schulz in float64, and expert by expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.core.training.test_rounded import model_of
from torch import Tensor, nn

from moelab import Registry
from moelab.config.run import OptimizerConfig
from moelab.hookspecs import OPTIMIZERS
from moelab.nn.narrow import narrow
from moelab.nn.optimizing import OptimizerContext, trained_parameters
from moelab.planning.memory import predict
from moelab.planning.traffic import Problem
from moelab.testing.optimizers import KitModel, OptimizerCase
from moelab.training.optimizer import state_bytes
from moelab_plugins.optimizers.muon import COEFFICIENTS, adjusted, orthogonal

COMPONENT = Registry(entry_points=False).components(OPTIMIZERS)["muon"]
GATE_UP, DOWN = "layers.0.experts.gate_up", "layers.0.experts.down"


class Matrices(nn.Module):
    """Wide, tall and square."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"wide": (4, 9), "tall": (9, 4), "square": (6, 6)}.items():
            self.register_parameter(name, nn.Parameter(torch.sin(torch.arange(float(shape[0] * shape[1]))).view(shape)))


def gradient(number: int, like: Tensor) -> Tensor:
    return torch.cos(torch.arange(like.numel()) * (1.7 + number)).view(like.shape)


@pytest.mark.parametrize("rule", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_on_matrices_it_is_torchs_muon_to_the_bit(rule: str, nesterov: bool) -> None:
    ours, theirs = Matrices(), Matrices()
    case = OptimizerCase(COMPONENT, {"adjust_lr_fn": rule, "nesterov": nesterov}, OptimizerConfig(lr=1e-2))
    one = case.component.build(case.options, case.context(ours))
    other = torch.optim.Muon(theirs.parameters(), lr=1e-2, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=rule)
    for number in range(4):
        for model, optimizer in ((ours, one), (theirs, other)):
            for parameter in model.parameters():
                parameter.grad = gradient(number, parameter)
            optimizer.step()
    for name, value in ours.named_parameters():
        assert torch.equal(value, theirs.get_parameter(name)), name


def newton_schulz(matrix: Tensor) -> Tensor:
    """By its definition, in float64."""
    a, b, c = COEFFICIENTS
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_the_iteration_is_newton_schulz_of_each_slice() -> None:
    matrices = torch.randn(5, 6, 11, generator=torch.Generator().manual_seed(0))
    for stack in (matrices, matrices.mT):
        found = orthogonal(stack, 5, torch.float32)
        for one, matrix in zip(found, stack, strict=True):
            expected = newton_schulz(matrix if matrix.shape[0] < matrix.shape[1] else matrix.T)
            expected = expected if matrix.shape[0] < matrix.shape[1] else expected.T
            torch.testing.assert_close(one.double(), expected, rtol=0, atol=2e-5)
            values = torch.linalg.svdvals(one.double())
            assert values.min() > 0.4 and values.max() < 1.3
        rough = orthogonal(stack, 5, torch.bfloat16).float()
        torch.testing.assert_close(rough, found, rtol=0, atol=0.05)


@pytest.mark.parametrize("rule", ["match_rms_adamw", "original"])
def test_each_expert_steps_as_its_own_matrices_would(rule: str) -> None:
    """Gate, up and down of each, as Hugging Face's folder has them: down is [D, F] there."""
    settings = OptimizerConfig(lr=1e-2)
    case = OptimizerCase(COMPONENT, {"adjust_lr_fn": rule, "ns_dtype": "float32"}, settings)
    stepped = case.build()
    before, bank = stepped.values(), stepped.model.bank
    stepped.step(0)
    assert bank.gate_up.grad is not None and bank.down.grad is not None
    for expert in range(3):
        parts = [
            *((GATE_UP, part, False) for part in (slice(0, 4), slice(4, 8))),
            (DOWN, slice(None), True),
        ]
        for name, rows, turned in parts:
            old, new, found = (t[expert, rows] for t in (before[name], stepped.values()[name], _grad(stepped, name)))
            old, new, found = (t.T if turned else t for t in (old, new, found))
            ahead = found * (0.05 * 0.95 + 0.05)  # nesterov's look at a momentum that was 0
            wide = found.shape[0] <= found.shape[1]
            step = newton_schulz(ahead if wide else ahead.T)
            step = step if wide else step.T
            expected = old.double() * (1 - 1e-2 * 0.1) - 1e-2 * adjusted(rule, *found.shape) * step
            torch.testing.assert_close(new.double(), expected, rtol=0, atol=1e-6)


def _grad(stepped: Any, name: str) -> Tensor:
    found = stepped.model.get_parameter(name).grad
    assert found is not None
    return found


def test_embeddings_norms_routers_and_biases_are_adamws_to_the_bit() -> None:
    adamw = Registry(entry_points=False).components(OPTIMIZERS)["adamw"]
    one, other = OptimizerCase(COMPONENT).build(), OptimizerCase(adamw).build()
    for number in range(3):
        one.step(number)
        other.step(number)
    theirs = other.values()
    same = {name for name, value in one.values().items() if torch.equal(value, theirs[name])}
    assert same == theirs.keys() - {GATE_UP, DOWN, "layers.0.o_proj.weight"}


def test_a_matrix_has_one_moment_and_the_plan_counts_it() -> None:
    model = model_of()
    context = OptimizerContext(trained_parameters(model, {}), OptimizerConfig(algorithm={"name": "muon"}))
    optimizer = COMPONENT.build(COMPONENT.options(), context)
    total = sum(p.numel() for p in model.parameters())
    matrices = sum(one.parameter.numel() for one in context.trained if one.is_hidden_matrix)
    assert matrices > total / 2
    assert state_bytes(optimizer) == 4 * (2 * total - matrices)
    problem = Problem(1, 8, device="cpu", algorithm={"name": "muon"})
    assert predict(model.config, problem).memory.optimizer == state_bytes(optimizer)
    assert predict(model.config, Problem(1, 8, device="cpu")).memory.optimizer == 8 * total


def test_narrow_matrices_move_as_wide_ones_do_on_the_mean() -> None:
    """A step far below bf16's spacing: rounded to the nearest, nothing would move."""
    model = model_of()
    narrow(model)
    name = "layers.0.mlp.experts.down"
    start = torch.ones_like(model.get_parameter(name))
    moved = torch.zeros(start.shape, dtype=torch.float64)
    for seed in range(40):
        torch.manual_seed(seed)
        with torch.no_grad():
            model.get_parameter(name).copy_(start)
        context = OptimizerContext(trained_parameters(model, {}), OptimizerConfig(lr=1e-4, weight_decay=0.0))
        optimizer = COMPONENT.build(COMPONENT.options(), context)
        optimizer.zero_grad()
        parameter = model.get_parameter(name)
        parameter.grad = gradient(0, parameter).to(parameter.dtype)
        optimizer.step()
        moved += (parameter.detach().double() - 1) / 40
    wide = model_of()
    with torch.no_grad():
        wide.get_parameter(name).fill_(1.0)
    context = OptimizerContext(trained_parameters(wide, {}), OptimizerConfig(lr=1e-4, weight_decay=0.0))
    parameter = wide.get_parameter(name)
    parameter.grad = gradient(0, parameter).to(torch.bfloat16).float()
    COMPONENT.build(COMPONENT.options(), context).step()
    expected = parameter.detach().double() - 1
    spacing = 2.0**-7
    error = (spacing * float(expected.abs().mean()) / (40 * expected.numel())) ** 0.5
    sign = expected.sign()
    assert abs(float(((moved - expected) * sign).mean())) < 6 * error


def test_a_kit_model_has_a_matrix_of_every_kind() -> None:
    found = {one.name: one.is_hidden_matrix for one in trained_parameters(KitModel(), {})}
    assert {name for name, hidden in found.items() if hidden} == {GATE_UP, DOWN, "layers.0.o_proj.weight"}
