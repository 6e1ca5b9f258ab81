"""What an optimizer plugin is given, and what it gives back: the contract of `optimizer.algorithm`.

E experts, D hidden size, F width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moelab.config.run import OptimizerConfig
from moelab.moe.activation import num_inputs
from moelab.moe.experts import ExpertBank
from moelab.nn.names import matching
from moelab.seeds import derive_seed

Optimizer = torch.optim.Optimizer
LEARNING_RATES = "optimizer.learning_rates"
NO_HIDDEN_MATRIX = {"embed_tokens", "lm_head", "router"}  # parts of names: what Muon's authors leave to AdamW


class WeightsOnDisk(Protocol):
    """A checkpoint whose model is the run's own, none of it read yet; names are those of the parameters."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read_into(self, name: str, tensor: Tensor) -> None:
        """Set `tensor` to the stored values; of one that lies in pieces, this process's own."""
        ...


@dataclass(frozen=True)
class Kept:
    """What an optimizer holds for each parameter of a group, for checkpoints and for who counts memory."""

    stored: Mapping[str, torch.dtype]  # in its state, of the parameter's shape: goes into checkpoints
    scalars: frozenset[str] = frozenset({"step"})  # in its state, too
    beside: int = 0  # bytes a number that are held and made anew where a run goes on

    @property
    def bytes_each(self) -> int:
        """A number of the parameter."""
        return sum(dtype.itemsize for dtype in self.stored.values()) + self.beside


@dataclass(frozen=True)
class Trained:
    """A parameter that is trained, and what of the model an optimizer may want to know about it."""

    name: str
    parameter: nn.Parameter
    factor: float = 1.0  # on the learning rate (`optimizer.learning_rates`)
    decays: bool = False  # a matrix or a stack of them
    blocks: int = 1  # matrices that lie below each other in a slice: 2 where gate and up stand in one
    input_first: bool = False  # its matrices hold what they read along the rows, as [in, out]

    @property
    def is_router(self) -> bool:
        return "router" in self.name.split(".")

    @property
    def is_hidden_matrix(self) -> bool:
        """A matrix, or a stack of one for each expert, between the hidden layers: no embedding, head, router or row."""
        words = set(self.name.split("."))
        return self.decays and not words & NO_HIDDEN_MATRIX and min(self.parameter.shape[-2:]) > 1

    def slices(self, values: Tensor) -> Tensor:
        """`values`, of the parameter's shape or of its first rows [e, ...], one matrix a slice: [n, rows, columns].

        An expert's gate and up projection are two; a vector is one row. A view where `values` is contiguous.
        """
        if not self.decays:
            return values.reshape(1, 1, -1)
        if values.dim() == 2:
            return values.reshape(self.blocks, -1, values.shape[-1])
        return values.reshape(-1, values.shape[-2] // self.blocks, values.shape[-1])


@dataclass(frozen=True)
class OptimizerContext:
    """What an optimizer is built from: `Component.build(options, context) -> torch.optim.Optimizer`.

    Its groups hold (name, parameter) pairs and `factor`, as `groups` makes them; each parameter lies in one. The rate
    of a group is set before each step. In `step()`, which is called without a closure, a parameter whose gradient is
    None stays as it is. A slice of a stack of experts sees no other slice's gradient.

    Optional, looked up by name:
    - `kept(group) -> Kept`: what it holds. Without it the state may be any tensors of a parameter's shape and
      scalars; memory is counted as of AdamW's two moments then.
    - `begin()`: called once before the first step, and before a state is restored: for what is long to read.
    - `restored() -> str | None`: after a state was restored; what is wrong with it.
    """

    trained: Sequence[Trained]
    settings: OptimizerConfig = field(default_factory=OptimizerConfig)
    processes: int = 1  # over which the parameters are laid (DTensor, `moelab.nn.pieces`)
    adapters: bool = False  # what is trained are the factors of adapters, and no weights of the model
    # Of what is drawn at random. None: torch's own, which each training step of moelab sets; another trainer's doesn't.
    seed: int | None = None
    # (folder, key that names it) -> its weights, checked to be of the same model and tokenizer, ConfigError else. None
    # where nothing is to be read: a plan.
    weights: Callable[[str, str], WeightsOnDisk] | None = None

    @property
    def moments(self) -> torch.dtype:
        """In which what is kept of gradients lies."""
        found: torch.dtype = getattr(torch, self.settings.moments_dtype)
        return found

    @property
    def narrow(self) -> bool:
        """Whether numbers of 16 bits are kept from step to step, which must be rounded at random."""
        return torch.bfloat16 in (self.moments, *(one.parameter.dtype for one in self.trained))

    def groups(self, trained: Iterable[Trained] | None = None, **own: Any) -> list[dict[str, Any]]:
        """Parameter groups, one for each factor and decay; `own`: what each of them is given besides."""
        chosen = list(self.trained if trained is None else trained)
        groups = [
            {
                "params": [(one.name, one.parameter) for one in chosen if (one.decays, one.factor) == (decays, factor)],
                "weight_decay": self.settings.weight_decay if decays else 0.0,
                "factor": factor,
                **own,
            }
            for factor in sorted({1.0, *(one.factor for one in chosen)})
            for decays in (True, False)
        ]
        return [group for group in groups if group["params"]]


def trained_parameters(model: nn.Module, patterns: Mapping[str, float], inside: str = "") -> list[Trained]:
    """What of `model` has a gradient; a tied matrix comes once. `inside`: what is cut off the names' beginning.

    Raises ConfigError for a pattern that matches nothing.
    """
    by_name = {name.removeprefix(inside): p for name, p in model.named_parameters(remove_duplicate=False)}
    factors = learning_rate_factors(by_name, patterns)
    found = []
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        home, _, own = path.rpartition(".")
        owner, name = model.get_submodule(home), path.removeprefix(inside)
        gated = isinstance(owner, ExpertBank) and own.startswith("gate_up")
        found.append(
            Trained(
                name,
                parameter,
                factors.get(id(parameter), 1.0),
                decays=parameter.ndim >= 2 and not name.endswith("bias"),
                blocks=num_inputs(owner.activation) if gated and isinstance(owner, ExpertBank) else 1,
                input_first=own in getattr(owner, "INPUT_FIRST", ()),
            )
        )
    return found


def learning_rate_factors(by_name: Mapping[str, nn.Parameter], patterns: Mapping[str, float]) -> dict[int, float]:
    """{id of a parameter: factor} of those that a pattern matches, of several the last; a tied matrix has both names.

    Raises ConfigError for a pattern that matches nothing.
    """
    found: dict[int, float] = {}
    for pattern, factor in patterns.items():
        found |= dict.fromkeys((id(by_name[name]) for name in matching(by_name, pattern, LEARNING_RATES)), factor)
    return found


def kept_by(optimizer: Optimizer, group: Mapping[str, Any]) -> Kept | None:
    """What `optimizer` says that it holds for each parameter of a group; None where it says nothing."""
    says = getattr(optimizer, "kept", None)
    found: Kept | None = None if says is None else says(group)
    return found


def kept_of(optimizer: Optimizer, group: Mapping[str, Any]) -> Kept:
    """What it holds; of one that says nothing as much as AdamW in fp32."""
    return kept_by(optimizer, group) or Kept(dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.float32))


def each(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], str, nn.Parameter]]:
    """(group, name, parameter) of all that it steps."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            yield group, name, parameter


def noise_seed(seed: int | None, purpose: str, name: str, step: Tensor) -> int:
    """Of the stream of one parameter in one step. `step`: how many there were, looked at only where a `seed` is given.

    Keyed by name, so that neither the order of parameters nor a frozen neighbour changes a draw.
    """
    if seed is None:
        return derive_seed(torch.initial_seed(), purpose, name)
    return derive_seed(seed, purpose, name, int(step))


def noise_of(seed: int | None, purpose: str, name: str, step: Tensor, device: torch.device) -> torch.Generator:
    """The stream itself."""
    return torch.Generator(device=device).manual_seed(noise_seed(seed, purpose, name, step))
