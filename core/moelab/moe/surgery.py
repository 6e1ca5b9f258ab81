"""The contracts of surgery on the experts of a trained layer: a plan says where each new expert comes from.

E experts of F neurons each become E' of F'. A plan is made from shapes, a seed and what was measured, and names no
tensor: `moelab.surgery` carries it out on weights, on the optimizer's moments, and on the router's rows alike. So an
operation is a plan, and nothing else.

What becomes of the moments follows from one thought. Where the function stays as it is, the gradient of each new
parameter is a known multiple r of the gradient of what it was made of: then exp_avg is multiplied by r, and exp_avg_sq
by r^2. With d the factor on the down projection and w the part of its source's routing weight that an expert gets:
r = w d for gate and up, r = w for down, and 1 / copies for the router's row (the sum over all rows that were made of
one row is then its gradient). An expert made of several takes the sum of their moments: were their weights one, its
gradient would be the sum of theirs, and the squares add up as far as gradients of different tokens are uncorrelated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from moelab.moe.layout import ExpertLayout
from moelab.plugin_faults import article

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]
LOAD, TOGETHER, SALIENCY, KNOCKOUT, OUTPUTS = "load", "together", "saliency", "knockout", "outputs"
MEASURES = (LOAD, TOGETHER, SALIENCY, KNOCKOUT, OUTPUTS)  # what a surgery may need: fields of `Scores`


@dataclass(frozen=True)
class ExpertRows:
    """How a router's own tensors follow its experts: `Router.expert_rows`.

    `copies`: of m experts with equal rows among m times as many experts and choices, each gets in evaluation 1/m of
    the weight that one had ("share": a softmax, or weights that are normalised), or all of it ("whole": a sigmoid).
    None: neither, so that no surgery that multiplies experts leaves the function as it is.
    `shared`: those of `tensors` that count in scores of which m equal experts have 1/m each (a bias or a threshold on a
    softmax): each of m gets 1/m of the value too, so that the same experts are chosen.
    """

    tensors: tuple[str, ...] = ()  # parameters and buffers of which row e is expert e's; rows behind the experts stay
    copies: str | None = None
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class SurgeryContext:
    """What a surgery is built from; one for each layer that is operated on."""

    layer_id: int
    num_hidden_layers: int
    hidden_size: int
    layout: ExpertLayout
    rows: ExpertRows
    seed: int = 0


@dataclass(frozen=True)
class Scores:
    """What was measured of one layer's experts on a text; what nobody asked for is None."""

    tokens: int
    load: Floats | None = None  # [E] assignments
    together: Floats | None = None  # [E, E] tokens that have both experts; the diagonal is `load`
    saliency: Floats | None = None  # [E] REAP (2510.13999): mean over an expert's tokens of weight * |output|; none: 0
    knockout: Floats | None = None  # [E] nats a token that the model loses without it; the layer's weights renormalised
    outputs: Floats | None = None  # [E, D] mean output over all tokens, routed to it or not (HC-SMoE 2410.08589)


@dataclass(frozen=True)
class Evidence:
    """What a plan may look at beside shapes: the layer's own tensors, and what was measured."""

    read: Callable[[str], Tensor]  # "experts.gate_up", "experts.down", "router.weight" ... -> the whole of it
    scores: Scores | None = None

    def measured(self, name: str) -> Floats:
        """A field of the scores that the surgery `needs`."""
        value = None if self.scores is None else getattr(self.scores, name)
        assert value is not None, f"'{name}' was not measured: it must stand in `needs`"
        return np.asarray(value, np.float64)


@dataclass(frozen=True)
class NewExpert:
    """Where one expert of the new layer comes from.

    Its weights are the mean of its sources' by `shares`, neuron `neurons[i][f]` of source i standing at f; its row of
    the router likewise. `noise` and `row_noise`: standard deviation of what is added, in that of the matrix.
    """

    sources: tuple[int, ...]
    shares: tuple[float, ...] = (1.0,)  # sum to one
    neurons: tuple[Whole, ...] | None = None  # [F'] for each source; None: all of them, as they stand
    down: float = 1.0  # factor d on the down projection
    weight: float = 1.0  # w: the part of its source's routing weight that it is expected to get
    copies: int = 1  # experts that were made of the same source
    noise: float = 0.0
    row_noise: float = 0.0


@dataclass(frozen=True)
class LayerPlan:
    """A layer after its surgery. `exact`: in evaluation the function stays as it was; `because`: why, or why not."""

    experts: tuple[NewExpert, ...]
    num_experts_per_tok: int
    moe_intermediate_size: int
    exact: bool
    because: str
    warnings: tuple[str, ...] = field(default=())

    @property
    def layout(self) -> ExpertLayout:
        return ExpertLayout(len(self.experts), self.num_experts_per_tok, self.moe_intermediate_size)


@runtime_checkable
class Surgery(Protocol):
    """One operation on one layer. What shapes can't carry is refused when it is built."""

    needs: frozenset[str]  # of MEASURES

    def plan(self, evidence: Evidence) -> LayerPlan: ...


def plan_fault(plan: object, context: SurgeryContext) -> str | None:
    """What is wrong with what a surgery planned, for `PluginPart.fault`; None: nothing."""
    if not isinstance(plan, LayerPlan):
        return f"planned {article(plan)}; it must return a moelab.LayerPlan"
    if not plan.experts:
        return "planned a layer without experts"
    if not 1 <= plan.num_experts_per_tok <= len(plan.experts):
        return f"planned {plan.num_experts_per_tok} experts a token, of {len(plan.experts)}"
    for index, expert in enumerate(plan.experts):
        fault = _expert_fault(expert, plan.moe_intermediate_size, context.layout)
        if fault is not None:
            return f"planned expert {index} {fault}"
    return None


def _expert_fault(expert: NewExpert, width: int, layout: ExpertLayout) -> str | None:
    count = len(expert.sources)
    if not count or len(expert.shares) != count or abs(sum(expert.shares) - 1) > 1e-9:
        return f"of sources {expert.sources} by shares {expert.shares}; one share each, and their sum must be 1"
    if not all(0 <= source < layout.num_experts for source in expert.sources):
        return f"of sources {expert.sources}; the layer has the experts 0 .. {layout.num_experts - 1}"
    if expert.copies < 1 or min(expert.noise, expert.row_noise) < 0:
        return f"with copies {expert.copies}, noise {expert.noise} and row_noise {expert.row_noise}"
    if expert.neurons is None:
        return None if width == layout.moe_intermediate_size else "without saying which neurons it keeps"
    if len(expert.neurons) != count or any(len(of) != width for of in expert.neurons):
        return f"of other numbers of neurons than moe_intermediate_size {width}"
    if any(of.min() < 0 or of.max() >= layout.moe_intermediate_size for of in expert.neurons):
        return f"of neurons outside 0 .. {layout.moe_intermediate_size - 1}"
    return None


def expert_rows_of(router: object, tensors: Sequence[str]) -> ExpertRows | str:
    """What a router declares, or why its experts can't be operated on. `tensors`: names in its state."""
    declared = getattr(router, "expert_rows", None)
    if declared is None:
        return ExpertRows() if not tensors else f"it does not say which of {', '.join(tensors)} follow its experts"
    if isinstance(declared, ExpertRows):
        unknown = [name for name in (*declared.tensors, *declared.shared) if name not in tensors]
        return f"its `expert_rows` names {unknown[0]}, which it does not have" if unknown else declared
    return str(declared)
