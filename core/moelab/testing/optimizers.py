"""What every optimizer must do: step each trained parameter by its own gradient alone, and go on as it left off.

E experts of F neurons, D hidden size, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelab.checkpoint import TRAINING, stored_tensors
from moelab.components import Component
from moelab.config.run import OptimizerConfig
from moelab.moe.experts import ExpertBank
from moelab.moe.layout import ExpertLayout
from moelab.nn.optimizing import Optimizer, OptimizerContext, each, kept_by, trained_parameters
from moelab.plugin_faults import article
from moelab.seeds import derive_seed, generator
from moelab.tensor_file import write_tensors
from moelab.testing.report import make_options, promised, run_checks
from moelab.training.optimizer import (
    begin,
    optimizer_fault,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
    state_bytes,
)

EXPERTS, WIDTH, HIDDEN, VOCABULARY = 3, 4, 6, 10
FEW = (0, 1)  # neurons of expert 2 that are all zero, as those that even out widths are


class KitModel(nn.Module):
    """Parameters of every role, under the names that they have in a model: [V, D], [E, D], a bank, [D, D], [D]."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Module()
        layer.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        layer.experts = ExpertBank(ExpertLayout(EXPERTS, 1, WIDTH), HIDDEN, bias=True)
        layer.o_proj, layer.norm = nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN, bias=False)
        self.embed_tokens, self.layers = nn.Embedding(VOCABULARY, HIDDEN), nn.ModuleList([layer])
        self.fill(0)

    @torch.no_grad()
    def fill(self, seed: int) -> None:
        """Random values, but for the neurons that are zero."""
        for name, parameter in self.named_parameters():
            parameter.normal_(0.0, 0.5, generator=generator(seed, "kit", name))
        bank = self.bank
        assert bank.gate_up_bias is not None
        self.clear(bank.gate_up, bank.down, bank.gate_up_bias)

    @property
    def bank(self) -> ExpertBank:
        layer: Any = self.layers[0]
        bank: ExpertBank = layer.experts
        return bank

    @staticmethod
    def clear(gate_up: Tensor, down: Tensor, bias: Tensor) -> None:
        for block in (0, WIDTH):
            gate_up[2, [block + neuron for neuron in FEW]] = 0
            bias[2, [block + neuron for neuron in FEW]] = 0
        down[2, list(FEW)] = 0


class _OfAModel:
    """A checkpoint: the kit's model of another seed."""

    def __init__(self, seed: int) -> None:
        model = KitModel()
        model.fill(seed)
        self._tensors = dict(model.named_parameters())
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read_into(self, name: str, tensor: Tensor) -> None:
        tensor.copy_(self._tensors[name].detach())


def weights_of(folder: str, key: str) -> _OfAModel:
    """Whatever folder is named: another one, another model."""
    del key
    return _OfAModel(derive_seed(1, folder))


@dataclass
class Stepped:
    """A model and the optimizer that trains it."""

    model: KitModel
    optimizer: Optimizer

    @torch.no_grad()
    def step(self, number: int, skipped: Sequence[str] = (), change: Mapping[str, float] | None = None) -> None:
        """With gradients of this number; `skipped` have none; `change`: on those of single parameters."""
        torch.manual_seed(derive_seed(5, number))
        for name, parameter in self.model.named_parameters():
            drawn = torch.empty(parameter.shape).normal_(generator=generator(number, "gradient", name))
            parameter.grad = None if name in skipped else drawn
        KitModel.clear(*(self._gradient(name) for name in ("gate_up", "down", "gate_up_bias")))
        for name, amount in (change or {}).items():
            gradient = self.model.get_parameter(name).grad
            assert gradient is not None
            gradient[0] += amount
        self.optimizer.step()

    def _gradient(self, name: str) -> Tensor:
        """Of one of the bank's; what is written to one that has none is lost."""
        parameter: Tensor = getattr(self.model.bank, name)
        return torch.empty_like(parameter) if parameter.grad is None else parameter.grad

    def values(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


@dataclass
class OptimizerCase:
    """One optimizer under test."""

    component: Component[OptimizerContext, Optimizer]
    options: Any = None
    settings: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-2))

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)

    def context(self, model: nn.Module, **other: Any) -> OptimizerContext:
        trained = trained_parameters(model, self.settings.learning_rates)
        return OptimizerContext(trained, self.settings, weights=weights_of, **other)

    def build(self, *, backwards: bool = False, settings: OptimizerConfig | None = None) -> Stepped:
        """Ready for its first step. `backwards`: parameters come in the opposite order."""
        model = KitModel()
        context = replace(self.context(model), settings=settings or self.settings)
        if backwards:
            context = replace(context, trained=list(reversed(context.trained)))
        optimizer = self.component.build(self.options, context)
        promised(optimizer_fault(optimizer, context), self.component.build)
        set_learning_rate(optimizer, context.settings.lr)
        begin(optimizer)
        return Stepped(model, optimizer)


def holds_each_trained_parameter_once(case: OptimizerCase) -> None:
    """A torch.optim.Optimizer whose groups have names and `factor`, as the context's groups do."""
    stepped = case.build()
    assert isinstance(stepped.optimizer, Optimizer), f"built {article(stepped.optimizer)}"


def moves_what_has_a_gradient_and_nothing_else(case: OptimizerCase) -> None:
    """A parameter whose gradient is None stays to the bit, without a state; the others move."""
    stepped, skipped = case.build(), ("layers.0.o_proj.weight", "embed_tokens.weight", "layers.0.experts.down")
    before = stepped.values()
    for number in range(2):
        stepped.step(number, skipped)
    for name, after in stepped.values().items():
        moved = not torch.equal(before[name], after)
        assert moved != (name in skipped), f"{name} {'moved' if moved else 'stayed'}"
        assert bool(torch.isfinite(after).all()), f"{name} is not finite"


def goes_downhill(case: OptimizerCase) -> None:
    """Sixty steps on the distance to a point lower it."""
    stepped = case.build()
    goal = {name: value + 0.1 * torch.sign(value) for name, value in stepped.values().items()}

    def distance() -> float:
        return sum(float((value - goal[name]).square().sum()) for name, value in stepped.values().items())

    before = distance()
    for number in range(60):
        torch.manual_seed(number)
        for name, parameter in stepped.model.named_parameters():
            parameter.grad = 2 * (parameter.detach() - goal[name])
        stepped.optimizer.step()
    assert distance() < before, f"the distance is {distance():.3g} after, {before:.3g} before"


def experts_are_apart(case: OptimizerCase) -> None:
    """Another gradient of the first expert leaves the steps of the others as they were."""
    one, other = case.build(), case.build()
    bank = ("layers.0.experts.gate_up", "layers.0.experts.down")
    for number in range(3):
        one.step(number)
        other.step(number, change=dict.fromkeys(bank, 7.0))
    for name in bank:
        a, b = one.values()[name], other.values()[name]
        assert not torch.equal(a[0], b[0]), f"{name}: the first expert does not hear of its gradient"
        assert torch.equal(a[1:], b[1:]), f"{name}: the other experts hear of the first one's gradient"


def what_is_zero_stays(case: OptimizerCase) -> None:
    """Neurons of zeros without gradient, which even out the experts' widths, stay zero."""
    stepped = case.build()
    for number in range(3):
        stepped.step(number)
    bank = stepped.model.bank
    assert bank.gate_up_bias is not None
    for block in (0, WIDTH):
        rows = [block + neuron for neuron in FEW]
        assert not bool(bank.gate_up[2, rows].any() | bank.gate_up_bias[2, rows].any()), "neurons of zeros move"
    assert not bool(bank.down[2, list(FEW)].any()), "neurons of zeros move"


def the_order_of_parameters_says_nothing(case: OptimizerCase) -> None:
    """The same bits whichever comes first: what is drawn is keyed by name."""
    one, other = case.build(), case.build(backwards=True)
    for number in range(2):
        one.step(number)
        other.step(number)
    for name, value in one.values().items():
        assert torch.equal(value, other.values()[name]), f"{name} hangs on the order of parameters"


def keeps_what_it_says(case: OptimizerCase) -> None:
    """State is tensors of the parameter's shape and scalars, those of `kept`, where it has one, and of that type."""
    stepped = case.build()
    stepped.step(0)
    for group, name, parameter in each(stepped.optimizer):
        kept, state = kept_by(stepped.optimizer, group), stepped.optimizer.state[parameter]
        for key, value in state.items():
            shaped = isinstance(value, Tensor) and value.shape in (parameter.shape, torch.Size([]))
            assert shaped, f"state '{key}' of {name} is {article(value)}, and no tensor of its shape or scalar"
        if kept is None:
            continue
        says = dict(kept.stored) | dict.fromkeys(kept.scalars)
        assert says.keys() == state.keys(), f"{name}: kept() says {sorted(says)}, its state holds {sorted(state)}"
        for key, dtype in kept.stored.items():
            assert state[key].dtype == dtype, f"{name}: kept() says {dtype} of '{key}', which is {state[key].dtype}"
    assert state_bytes(stepped.optimizer) >= state_bytes(stepped.optimizer, stored=True)


def goes_on_as_it_left_off(case: OptimizerCase) -> None:
    """Five steps, and three with two more after the state went through a file: the same bits."""
    straight, first = case.build(), case.build()
    for number in range(5):
        straight.step(number)
        if number < 3:
            first.step(number)
    again = case.build()
    again.model.load_state_dict(first.model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        tensors = {key: t.contiguous() for key, t in optimizer_tensors(first.model, first.optimizer).items()}
        write_tensors(Path(folder) / TRAINING, tensors)
        restore_optimizer(again.model, again.optimizer, stored_tensors(Path(folder), TRAINING))
    for number in range(3, 5):
        again.step(number)
    for name, value in straight.values().items():
        assert torch.equal(value, again.values()[name]), f"{name} goes on otherwise after its state was restored"


def follows_the_rate(case: OptimizerCase) -> None:
    """The rate of each group is taken before each step: at a hundredth of it the first step is shorter."""
    lengths = []
    for rate in (1.0, 0.01):
        stepped = case.build(settings=replace(case.settings, weight_decay=0.0))
        set_learning_rate(stepped.optimizer, case.settings.lr * rate)
        before = stepped.values()
        stepped.step(0)
        lengths.append(sum(float((v - before[n]).abs().sum()) for n, v in stepped.values().items()))
    assert lengths[1] < lengths[0], "a hundredth of the rate moves as far"


OPTIMIZER_CHECKS: tuple[Callable[[OptimizerCase], None], ...] = (
    holds_each_trained_parameter_once,
    moves_what_has_a_gradient_and_nothing_else,
    goes_downhill,
    experts_are_apart,
    what_is_zero_stays,
    the_order_of_parameters_says_nothing,
    keeps_what_it_says,
    goes_on_as_it_left_off,
    follows_the_rate,
)


def check_optimizer(component: Component[OptimizerContext, Optimizer], options: Any = None) -> None:
    """Run every check of OPTIMIZER_CHECKS; raises ConformanceError naming those that fail."""
    run_checks("optimizer", component, OptimizerCase(component, options), OPTIMIZER_CHECKS)
