"""The kit catches a planted fault of each kind, and says which check failed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moelab import (
    ConfigError,
    Corpus,
    Document,
    ExpectedAssignments,
    ExpertLayout,
    MoEContext,
    Routing,
    TokenInfo,
    build_corpus,
    component,
    testing,
)
from moelab.initialisers import NeuronPlan
from moelab.moe.activation import SwiGLU
from moelab.moe.capacity import refuse_noncausal
from moelab.moe.experts import add_down_bias, add_up_bias
from moelab.moe.surgery import ExpertRows, LayerPlan, NewExpert
from moelab.nn.mlp import MLP
from moelab.testing import (
    activations,
    backends,
    balance_losses,
    data_sources,
    expert_layouts,
    initialisers,
    observers,
    routers,
    shared_experts,
    surgeries,
)


@dataclass
class NoOptions:
    pass


class Good(nn.Module):
    """A sound router, with the seams where faults are planted."""

    def __init__(self, options: Any, context: MoEContext) -> None:
        super().__init__()
        self.top_k, self.experts = context.num_experts_per_tok, context.num_experts
        self.weight = nn.Parameter(torch.empty(self.experts, context.hidden_size))
        self.register_buffer("bias", torch.zeros(self.experts))

    def logits(self, x: Tensor, info: TokenInfo) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.float(), self.weight.float())

    def choose(self, scores: Tensor) -> Tensor:
        return (scores + self.bias).topk(self.top_k).indices

    def weigh(self, scores: Tensor, expert: Tensor) -> Tensor:
        return scores.gather(1, expert)

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        logits = self.logits(x, info)
        scores = logits.softmax(-1)
        expert = self.choose(scores)
        weight = self.weigh(scores, expert)
        return Routing.from_topk(expert, weight, self.experts, scores=scores, logits=logits, token_mask=info.mask)

    def after_step(self, counts: Tensor) -> None:
        load = counts.float()
        self.bias += 0.1 * torch.sign(load.mean() - load)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.bias = self.bias.float()
        return self


class SameExpertTwice(Good):
    def choose(self, scores: Tensor) -> Tensor:
        return scores.argmax(-1, keepdim=True).expand(-1, self.top_k)


class BFloat16Weights(Good):
    def weigh(self, scores: Tensor, expert: Tensor) -> Tensor:
        return scores.gather(1, expert).bfloat16()


class DetachedWeights(Good):
    def weigh(self, scores: Tensor, expert: Tensor) -> Tensor:
        return scores.gather(1, expert).detach()


class ImpossibleExpectation(Good):
    expected_assignments = ExpectedAssignments(9.0, "more than there are")


class DeafParameter(Good):
    def __init__(self, options: Any, context: MoEContext) -> None:
        super().__init__(options, context)
        self.unused = nn.Parameter(torch.zeros(3))


class GlobalNoise(Good):
    def logits(self, x: Tensor, info: TokenInfo) -> Tensor:
        return super().logits(x, info) + torch.randn(1)


class KeepsLogits(Good):
    def logits(self, x: Tensor, info: TokenInfo) -> Tensor:
        self.last = super().logits(x, info)
        return self.last


class StepsInForward(Good):
    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        routing = super().forward(x, info)
        self.bias += 0.01
        return routing


class IgnoresMask(Good):
    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        return super().forward(x, replace(info, mask=None))


class PaddingLeaks(Good):
    """Mean over all tokens, padding included: also not causal, and no two sequences are apart."""

    def logits(self, x: Tensor, info: TokenInfo) -> Tensor:
        return super().logits(x - x.mean(0), info) if len(x) else super().logits(x, info)


class SeesLength(Good):
    """Scales by the padded length of the sequence."""

    def logits(self, x: Tensor, info: TokenInfo) -> Tensor:
        return super().logits(x, info) / info.sequence_shape()[1] * 4


class SeesTheNext(Good):
    def logits(self, x: Tensor, info: TokenInfo) -> Tensor:
        batch, length = info.sequence_shape()
        shifted = x.view(batch, length, -1).roll(-1, dims=1).reshape(x.shape) if len(x) else x
        return super().logits(x + shifted, info)


class SeesOtherSequences(Good):
    def logits(self, x: Tensor, info: TokenInfo) -> Tensor:
        first = x[:1] if info.num_sequences and info.num_sequences > 1 else torch.zeros_like(x[:1])
        return super().logits(x, info) + super().logits(first, info)


class HiddenState(Good):
    """What `after_step` learns is not in the state."""

    def __init__(self, options: Any, context: MoEContext) -> None:
        super().__init__(options, context)
        self.drift = 0.0

    def after_step(self, counts: Tensor) -> None:
        self.drift += 1.0

    def choose(self, scores: Tensor) -> Tensor:
        tilt = torch.arange(self.experts) * self.drift * 0.1
        return (scores + tilt).topk(self.top_k).indices


class BiasBecomesBFloat16(Good):
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return nn.Module._apply(self, fn, recurse)


class FollowsAutocast(Good):
    def logits(self, x: Tensor, info: TokenInfo) -> Tensor:
        return nn.functional.linear(x, self.weight).float()


class AsksTheDevice(Good):
    def choose(self, scores: Tensor) -> Tensor:
        if scores.numel() and float(scores.max()) > 2:
            raise AssertionError
        return super().choose(scores)


class NeedsTokens(Good):
    def logits(self, x: Tensor, info: TokenInfo) -> Tensor:
        return super().logits(x, info) - x.max().detach() * 0


class Overflows(Good):
    def weigh(self, scores: Tensor, expert: Tensor) -> Tensor:
        chosen = scores.gather(1, expert)
        return chosen.square().square().square() / chosen.square().square().square().sum(0, keepdim=True).square()


class CountsTooMany(Good):
    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        return replace(super().forward(x, info), balance_top_k=self.experts + 1)


class Int32(Good):
    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        routing = super().forward(x, info)
        return replace(routing, expert=routing.expert.int())


class Tuple(Good):
    def forward(self, x: Tensor, info: TokenInfo) -> Any:
        return (super().forward(x, info),)


class NegativeScores(Good):
    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        routing = super().forward(x, info)
        return replace(routing, scores=routing.logits)


class NamesNoCause(Good):
    def __init__(self, options: Any, context: MoEContext) -> None:
        super().__init__(options, context)
        self.causal = False


class RefusesUnsaid(Good):
    def __init__(self, options: Any, context: MoEContext) -> None:
        refuse_noncausal(context, "it might look ahead")
        super().__init__(options, context)


class WrongTopK(Good):
    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        routing = super().forward(x, info)
        order = torch.arange(routing.expert.numel()).flip(0)
        return replace(routing, token=routing.token[order])


class NamesTheWrongRows(Good):
    expert_rows = ExpertRows(("weight",))  # and the bias has one for each expert too


class NamesRowsThatAreNot(Good):
    expert_rows = ExpertRows(("weight", "bias", "offset"))


class ServesOthers(Good):
    def serving(self) -> Any:
        return lambda x, info: self(-x, info)


class SaysNothingOfWhy(Good):
    expert_rows = ""


ROUTER_FAULTS = [
    (NamesTheWrongRows, "its_rows_follow_its_experts"),
    (NamesRowsThatAreNot, "its_rows_follow_its_experts"),
    (SaysNothingOfWhy, "its_rows_follow_its_experts"),
    (SameExpertTwice, "gives_no_expert_twice_to_a_token"),
    (ServesOthers, "serves_as_it_decides"),
    (ImpossibleExpectation, "declares_what_it_can_serve"),
    (BFloat16Weights, "returns_what_the_contract_says"),
    (WrongTopK, "returns_what_the_contract_says"),
    (CountsTooMany, "returns_what_the_contract_says"),
    (Int32, "returns_what_the_contract_says"),
    (Tuple, "returns_what_the_contract_says"),
    (NegativeScores, "returns_what_the_contract_says"),
    (NamesNoCause, "says_whether_it_is_causal"),
    (RefusesUnsaid, "says_whether_it_is_causal"),
    (DetachedWeights, "gradients_reach_the_router"),
    (DeafParameter, "gradients_reach_the_router"),
    (GlobalNoise, "does_the_same_again"),
    (KeepsLogits, "keeps_nothing_of_a_batch"),
    (StepsInForward, "keeps_nothing_of_a_batch"),
    (IgnoresMask, "padding_changes_nothing"),
    (PaddingLeaks, "padding_changes_nothing"),
    (SeesLength, "right_padding_changes_nothing"),
    (SeesTheNext, "later_tokens_change_nothing"),
    (SeesOtherSequences, "sequences_are_apart"),
    (HiddenState, "state_is_saved_and_restored"),
    (BiasBecomesBFloat16, "stays_float32_in_a_bfloat16_model"),
    (FollowsAutocast, "stays_float32_in_a_bfloat16_model"),
    (AsksTheDevice, "nothing_waits_for_the_device"),
    (NeedsTokens, "few_tokens_are_routed"),
    (Overflows, "extremes_stay_finite"),
]


def test_a_sound_router_passes() -> None:
    testing.check_router(component("good", NoOptions, Good))


@pytest.mark.parametrize(("fault", "check"), ROUTER_FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_faulty_router_is_caught(fault: Any, check: str) -> None:
    with pytest.raises(testing.ConformanceError, match=check):
        testing.check_router(component("bad", NoOptions, fault))


def test_a_wrong_closed_form_is_caught() -> None:
    def twice(x: Tensor, router: Any, info: TokenInfo) -> Tensor:
        p = (x @ router.weight.t()).softmax(-1)
        return 2 * torch.where(p >= p.topk(2).values[:, -1:], p, 0.0)

    with pytest.raises(testing.ConformanceError, match="matches_its_closed_form"):
        testing.check_router(component("good", NoOptions, Good), reference=twice)
    testing.check_router(component("good", NoOptions, Good), reference=lambda x, r, i: twice(x, r, i) / 2)


def test_every_router_check_has_a_planted_fault() -> None:
    caught = {check for _, check in ROUTER_FAULTS} | {"matches_its_closed_form"}
    assert caught == {check.__name__ for check in routers.ROUTER_CHECKS}


@dataclass
class LossOptions:
    weight: float = 0.1


class GoodLoss:
    needs_batch_counts = True

    def __init__(self, options: LossOptions, context: Any) -> None:
        self.weight = options.weight
        self.layers = len(context.layouts)

    def layer(self, record: Any, context: Any) -> Tensor:
        routing = record.routing
        if routing.scores is None:
            raise ConfigError(f"layer {record.layer_id}: no scores")
        mask = torch.ones(routing.num_tokens) if routing.token_mask is None else routing.token_mask.float()
        mean = (routing.scores * mask[:, None]).sum(0) / mask.sum().clamp_min(1)
        counts = context.batch_counts[record.layer_id].float()
        return 8 * (counts / counts.sum().clamp_min(1) * mean).sum()

    def __call__(self, records: Any, context: Any) -> Tensor:
        return torch.stack([self.layer(r, context) for r in records]).mean()


def _loss(name: str, call: Any, **members: Any) -> Any:
    return type(name, (GoodLoss,), {"layer": call, **members})


def _with(change: Any) -> Any:
    return lambda self, r, c: change(GoodLoss.layer(self, r, c), self, r, c)


class Adapts(GoodLoss):
    """Changes its weight and forgets it."""

    def after_step(self, context: Any) -> None:
        self.weight *= 2


LOSS_FAULTS = [
    (type("Vector", (GoodLoss,), {"__call__": lambda self, r, c: GoodLoss.__call__(self, r, c)[None]}),
     "returns_a_finite_scalar"),
    (_loss("DividesByZero", _with(lambda v, s, r, c: v / c.batch_counts[r.layer_id].sum())), "returns_a_finite_scalar"),
    (_loss("AppliesItsWeight", _with(lambda v, s, r, c: v * s.weight)), "says_its_weight"),
    (_loss("CountsPadding", _with(lambda v, s, r, c: v + r.routing.scores.square().mean())), "padding_changes_nothing"),
    (_loss("Sums", _with(lambda v, s, r, c: v * r.counts.sum().float())), "a_copied_batch_costs_the_same"),
    (type("SumsLayers", (GoodLoss,), {"__call__": lambda self, r, c: sum(self.layer(x, c) for x in r)}),
     "layers_are_averaged"),
    (_loss("CountsItsMicroBatch", lambda self, r, c: GoodLoss.layer(
        self, r, replace(c, batch_counts={r.layer_id: r.counts}))), "a_split_changes_nothing"),
    (_loss("Detached", _with(lambda v, s, r, c: v.detach())), "a_gradient_reaches_the_layer"),
    (_loss("Unnamed", lambda self, r, c: 8 * r.routing.scores[0].sum()), "says_so_when_something_is_missing"),
    (Adapts, "steps_and_state_are_sound"),
    (_loss("Asks", _with(lambda v, s, r, c: v if float(v) < 1e9 else v * 2)), "waits_for_nothing"),
    (type("Weightless", (GoodLoss,), {"weight": property(lambda self: None, lambda self, value: None)}),
     "says_its_weight"),
    (_loss("AFloat", GoodLoss.layer, __call__=lambda self, r, c: 1.0),
     "returns_a_finite_scalar"),
    (_loss("Shifted", _with(lambda v, s, r, c: v + 1)), "has_its_value_at_balance"),
]  # fmt: skip


def test_a_sound_loss_passes() -> None:
    testing.check_balance_loss(component("good", LossOptions, GoodLoss), balanced=1.0)


@pytest.mark.parametrize(("fault", "check"), LOSS_FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_faulty_loss_is_caught(fault: Any, check: str) -> None:
    with pytest.raises(testing.ConformanceError, match=check):
        testing.check_balance_loss(component("bad", LossOptions, fault), balanced=1.0)


def test_every_loss_check_has_a_planted_fault() -> None:
    caught = [check for _, check in LOSS_FAULTS]
    assert all(any(c.__name__.startswith(name) for name in caught) for c in balance_losses.BALANCE_LOSS_CHECKS)


LAYOUT_FAULTS = [
    (lambda o, c: ExpertLayout(4, 8, 12), "gives_layouts_that_can_be_built"),
    (lambda o, c: ExpertLayout(4, 2, 12.0), "gives_layouts_that_can_be_built"),  # type: ignore[arg-type]
    (lambda o, c: (4, 2, 12), "gives_layouts_that_can_be_built"),
    (lambda o, c: ExpertLayout(4, 2, 12, [12] * 4), "widths_agree_with_their_number"),  # type: ignore[arg-type]
    (lambda o, c: ExpertLayout(4, 2, 12, (12, 12)), "widths_agree_with_their_number"),
    (lambda o, c: None, "some_layer_is_sparse"),
    (lambda o, c, seen=[]: seen.append(0) or ExpertLayout(4 + len(seen), 2, 12), "does_not_depend_on_the_order"),
]


@pytest.mark.parametrize(("fault", "check"), LAYOUT_FAULTS)
def test_a_faulty_layout_is_caught(fault: Any, check: str) -> None:
    with pytest.raises(testing.ConformanceError, match=check):
        testing.check_expert_layout(component("bad", NoOptions, fault))


def test_every_layout_check_has_a_planted_fault() -> None:
    caught = [check for _, check in LAYOUT_FAULTS]
    assert all(any(c.__name__.startswith(n) for n in caught) for c in expert_layouts.EXPERT_LAYOUT_CHECKS)


class GoodShared(MLP):
    intermediate_size = 20

    def __init__(self, options: Any, context: MoEContext) -> None:
        super().__init__(context.hidden_size, 20)


class KeepsOutput(GoodShared):
    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class ServesItself(GoodShared):
    def serving(self) -> Any:
        return lambda base, x: self(x)


class WritesIntoTheBase(GoodShared):
    def serving(self) -> Any:
        return lambda base, x: base.add_(self(x))


class UnusedGate(GoodShared):
    def __init__(self, options: Any, context: MoEContext) -> None:
        super().__init__(options, context)
        self.gate = nn.Linear(context.hidden_size, 1)


SHARED_FAULTS = [
    (type("Float32", (GoodShared,), {"forward": lambda s, x: MLP.forward(s, x).float()}),
     "returns_the_shape_and_dtype"),
    (type("Narrows", (GoodShared,), {"forward": lambda s, x: MLP.forward(s, x)[:, :3]}),
     "returns_the_shape_and_dtype"),
    (type("NoWidth", (GoodShared,), {"intermediate_size": None}), "says_how_wide_it_is"),
    (type("Leaks", (GoodShared,), {"forward": lambda s, x: MLP.forward(s, x) + x.cumsum(0)}), "tokens_are_apart"),
    (UnusedGate, "gradients_reach_all_parameters"),
    (ServesItself, "serves_as_it_computes"),
    (WritesIntoTheBase, "serves_as_it_computes"),
    (KeepsOutput, "keeps_nothing_and_restores"),
    (type("Asks", (GoodShared,), {
        "forward": lambda s, x: MLP.forward(s, x) * (1 if not len(x) or x.max() < 9 else 2)}),
     "waits_for_nothing"),
    (type("Twice", (GoodShared,), {"forward": lambda s, x: 2 * MLP.forward(s, x)}), "equals_its_closed_form"),
]  # fmt: skip


def _plain(x: Tensor, module: Any) -> Tensor:
    gate = x @ module.gate_proj.weight.t()
    return (gate * torch.sigmoid(gate) * (x @ module.up_proj.weight.t())) @ module.down_proj.weight.t()


def test_a_sound_shared_expert_passes() -> None:
    testing.check_shared_expert(component("good", NoOptions, GoodShared), reference=_plain)


@pytest.mark.parametrize(("fault", "check"), SHARED_FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_faulty_shared_expert_is_caught(fault: Any, check: str) -> None:
    with pytest.raises(testing.ConformanceError, match=check):
        testing.check_shared_expert(component("bad", NoOptions, fault), reference=_plain)


def test_every_shared_expert_check_has_a_planted_fault() -> None:
    caught = [check for _, check in SHARED_FAULTS]
    assert all(any(c.__name__.startswith(n) for n in caught) for c in shared_experts.SHARED_EXPERT_CHECKS)


class GoodActivation:
    gated = True

    def __init__(self, options: Any, context: Any) -> None:
        pass

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.tanh(gate) * up

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.act(*inputs)


class Forgets(GoodActivation):
    """Half of the gradient."""

    def differentiate(self, *inputs: Tensor) -> Any:
        def pullback(grad: Tensor, *outs: Tensor) -> None:
            outs[0].zero_()
            outs[1].copy_(grad * torch.tanh(inputs[0]))

        return self(*inputs), pullback


class Swaps(GoodActivation):
    """Gate and up that stand beside each other in the wrong order."""

    def of_joined(self, joined: Tensor) -> Tensor:
        return self(joined[:, 1], joined[:, 0])


def _activation(title: str, act: Any) -> Any:
    return type(title, (GoodActivation,), {"act": act})


ACTIVATION_FAULTS = [
    (type("NoGated", (GoodActivation,), {"gated": None}), "returns_the_shape_and_dtype_of_its_inputs"),
    (_activation("InPlace", lambda s, g, u: torch.tanh(g).mul_(u) + u.mul_(1.5)),
     "returns_the_shape_and_dtype_of_its_inputs"),
    (_activation("Float32", lambda s, g, u: g.float() * u.float()), "returns_the_shape_and_dtype_of_its_inputs"),
    (_activation("Sigmoid", lambda s, g, u: torch.sigmoid(g) + u * 0), "makes_nothing_of_nothing"),
    (_activation("Softmax", lambda s, g, u: torch.softmax(g, -1) * u), "neurons_are_apart"),
    (_activation("Noise", lambda s, g, u: torch.rand_like(g) * u), "repeats"),
    (Forgets, "differentiates_as_autograd_does"),
    (Swaps, "joined_inputs_give_the_same"),
    (_activation("Asks", lambda s, g, u: g * u * (1.0 if not g.numel() or g.max() < 9 else 2.0)), "waits_for_nothing"),
    (_activation("Twice", lambda s, g, u: 2 * torch.tanh(g) * u), "equals_its_closed_form"),
]  # fmt: skip


def _gate_by_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return (torch.exp(2 * gate) - 1) / (torch.exp(2 * gate) + 1) * up


def test_a_sound_activation_passes() -> None:
    testing.check_activation(component("good", NoOptions, GoodActivation), reference=_gate_by_tanh)


@pytest.mark.parametrize(("fault", "check"), ACTIVATION_FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_faulty_activation_is_caught(fault: Any, check: str) -> None:
    with pytest.raises(testing.ConformanceError, match=check):
        testing.check_activation(component("bad", NoOptions, fault), reference=_gate_by_tanh)


def test_every_activation_check_has_a_planted_fault() -> None:
    caught = [check for _, check in ACTIVATION_FAULTS]
    assert all(any(c.__name__.startswith(n) for n in caught) for c in activations.ACTIVATION_CHECKS)


class GoodBackend:
    name = "good"

    def __init__(self, options: Any, context: Any) -> None:
        pass

    def supports(self, problem: Any) -> str | None:
        return None

    def mix(self, x: Tensor, routing: Routing, bank: Any) -> Tensor:
        pre = torch.einsum("nd,nfd->nf", x[routing.token], bank.gate_up[routing.expert])
        out = torch.einsum(
            "nf,nfd->nd", self.act(add_up_bias(pre, routing.expert, bank), bank), bank.down[routing.expert]
        )
        y = torch.zeros_like(x).index_add(0, routing.token, out * routing.weight[:, None])
        return self.bias(y, routing, bank)

    act = staticmethod(lambda pre, bank: bank.activate(pre))
    bias = staticmethod(add_down_bias)

    def __call__(self, x: Tensor, routing: Routing, bank: Any) -> Tensor:
        return self.mix(x, routing, bank)


def _backend(title: str, mix: Any, **members: Any) -> Any:
    return type(title, (GoodBackend,), {"mix": mix, **members})


def _mean_of_top_k(self: Any, x: Tensor, routing: Routing, bank: Any) -> Tensor:
    return GoodBackend.mix(self, x, replace(routing, token=routing.token.sort().values), bank)


def _starved_garbage(self: Any, x: Tensor, routing: Routing, bank: Any) -> Tensor:
    missing = routing.counts() == 0
    return GoodBackend.mix(self, x, routing, bank) + (bank.down[missing].sum() * 1.0 if missing.any() else 0.0)


BACKEND_FAULTS = [
    (_backend("NoName", GoodBackend.mix, name=""), "says_what_it_does_not_support"),
    (_backend("SaysTrue", GoodBackend.mix, supports=lambda self, problem: problem.num_tokens == 8),
     "says_what_it_does_not_support"),
    (_backend("Float64", lambda s, x, r, b: GoodBackend.mix(s, x, r, b).double()), "equals_the_reference"),
    (_backend("Unweighted", lambda s, x, r, b: GoodBackend.mix(s, x, replace(r, weight=r.weight * 0 + 1), b)),
     "equals_the_reference"),
    (_backend("NoGradient", lambda s, x, r, b: GoodBackend.mix(s, x.detach(), r, b)), "equals_the_reference"),
    (_backend("Garbage", _starved_garbage), "serves_empty_experts"),
    (_backend("NeedsTokens", lambda s, x, r, b: GoodBackend.mix(s, x - x.max() * 0, r, b)),
     "serves_one_token_and_none"),
    (_backend("AssumesOrder", _mean_of_top_k), "serves_any_number_of_experts_per_token"),
    (_backend("WeighsPlaceholders", lambda s, x, r, b: GoodBackend.mix(
        s, x, r if r.served is None else replace(r, weight=r.weight.clamp_min(0.1)), b)), "serves_placeholders"),
    (_backend("KnowsSwiGLU", GoodBackend.mix, act=staticmethod(
        lambda pre, bank: SwiGLU()(*pre.chunk(2, -1)) if bank.activation.gated else bank.activate(pre))),
     "serves_any_activation_or_says_not"),
    (_backend("ForgetsBias", GoodBackend.mix, bias=staticmethod(lambda y, routing, bank: y)),
     "serves_biases_or_says_not"),
]  # fmt: skip


def test_a_sound_backend_passes() -> None:
    testing.check_backend(component("good", NoOptions, GoodBackend))


@pytest.mark.parametrize(("fault", "check"), BACKEND_FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_faulty_backend_is_caught(fault: Any, check: str) -> None:
    with pytest.raises(testing.ConformanceError, match=check):
        testing.check_backend(component("bad", NoOptions, fault))


def test_every_backend_check_has_a_planted_fault() -> None:
    assert {check for _, check in BACKEND_FAULTS} == {c.__name__ for c in backends.BACKEND_CHECKS}


class GoodInitialiser:
    def __init__(self, options: Any, context: Any) -> None:
        self.context = context
        self.calls = 0

    def plan(self, expert: int) -> NeuronPlan:
        random = np.random.default_rng((self.context.seed, expert))
        n = self.context.layout.moe_intermediate_size
        redrawn = random.random(n) < 0.5
        return NeuronPlan(random.integers(0, 24, n).astype(np.int32), dict.fromkeys(("gate", "up", "down"), redrawn))

    def materialise(self, plan: NeuronPlan, expert: int, matrix: str, dense: Any) -> Any:
        random = np.random.default_rng((self.context.seed, expert, len(matrix)))
        drawn = random.normal(0, 0.02, (len(plan.source), 8))
        return np.where(plan.redrawn[matrix][:, None], drawn, dense.float32(plan.source))


class CountsCalls(GoodInitialiser):
    def materialise(self, plan: NeuronPlan, expert: int, matrix: str, dense: Any) -> Any:
        self.calls += 1
        return super().materialise(plan, expert, matrix, dense) + self.calls


class IgnoresSeed(GoodInitialiser):
    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, replace(context, seed=0))


class Offers(GoodInitialiser):
    """Its redrawn rows by themselves."""

    def redrawn(self, plan: NeuronPlan, expert: int, matrix: str, dense: Any) -> Any:
        return GoodInitialiser.materialise(self, plan, expert, matrix, dense)[plan.changed(matrix)]


INITIALISER_FAULTS = [
    (type("TooFar", (GoodInitialiser,), {
        "plan": lambda s, e: replace(GoodInitialiser.plan(s, e), source=np.full(10, 24, np.int32))}),
     "plans_every_neuron"),
    (type("Nan", (GoodInitialiser,), {"materialise": lambda s, p, e, m, d: np.full((10, 8), np.nan)}),
     "fills_every_matrix"),
    (type("Planless", (GoodInitialiser,), {"plan": lambda s, e: GoodInitialiser.plan(s, e).source}),
     "plans_every_neuron"),
    (type("Whole", (GoodInitialiser,), {
        "materialise": lambda s, p, e, m, d: GoodInitialiser.materialise(s, p, e, m, d).astype(np.int64)}),
     "fills_every_matrix"),
    (CountsCalls, "any_order_gives_the_same"),
    (IgnoresSeed, "the_seed_decides"),
    (type("RedrawsOthers", (Offers,), {"redrawn": lambda s, p, e, m, d: Offers.redrawn(s, p, e, m, d)[::-1]}),
     "redraws_what_it_says"),
    (type("RedrawsMore", (Offers,), {
        "redrawn": Offers.redrawn,
        "materialise": lambda s, *a: Offers.materialise(s, *a) * np.where(a[0].changed(a[2]), 1, 2)[:, None]}),
     "redraws_what_it_says"),
]  # fmt: skip


@pytest.mark.parametrize("sound", [GoodInitialiser, Offers])
def test_a_sound_initialiser_passes(sound: Any) -> None:
    testing.check_initialiser(component("good", NoOptions, sound))


@pytest.mark.parametrize(("fault", "check"), INITIALISER_FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_faulty_initialiser_is_caught(fault: Any, check: str) -> None:
    with pytest.raises(testing.ConformanceError, match=check):
        testing.check_initialiser(component("bad", NoOptions, fault))


def test_every_initialiser_check_has_a_planted_fault() -> None:
    assert {check for _, check in INITIALISER_FAULTS} == {c.__name__ for c in initialisers.INITIALISER_CHECKS}


def test_a_failure_of_several_checks_is_said_once_with_its_file_and_line() -> None:
    class Raises(GoodObserver):
        def on_log(self, step: int) -> None:  # type: ignore[override]
            raise KeyError("nowhere")

    with pytest.raises(testing.ConformanceError) as caught:
        testing.check_observer(component("bad", NoOptions, Raises))
    told = str(caught.value)
    assert "fails 3 of 5 checks:\n  lives_through_a_run (and 2 more checks): raised KeyError: 'nowhere'" in told
    assert told.count("nowhere") == 1
    assert f"test_planted_faults.py:{Raises.on_log.__code__.co_firstlineno + 1})" in told


def test_what_fails_the_first_check_is_not_told_of_its_consequences() -> None:
    class Raises(Good):
        def forward(self, x: Tensor, info: TokenInfo) -> Routing:
            raise KeyError("nowhere")

    with pytest.raises(testing.ConformanceError) as caught:
        testing.check_router(component("bad", NoOptions, Raises))
    first, reason, rest = str(caught.value).splitlines()
    assert first.endswith("fails the first check:")
    assert f"test_planted_faults.py:{Raises.forward.__code__.co_firstlineno + 1})" in reason
    assert rest == f"  the other {len(routers.ROUTER_CHECKS) - 1} build on it, and were not run"


def test_a_failure_of_behaviour_too_has_the_place_of_the_part() -> None:
    with pytest.raises(testing.ConformanceError, match=r"keeps \.last on the module") as caught:
        testing.check_router(component("bad", NoOptions, KeepsLogits))
    assert f"test_planted_faults.py:{Good.forward.__code__.co_firstlineno})" in str(caught.value)


TEXTS = [f"Document number {n} says {n * n}." for n in range(20)]


def _documents(texts: list[str]) -> list[Document]:
    return [Document(text, "domain", f"name {index}") for index, text in enumerate(texts)]


def _both(corpus: Corpus) -> Corpus:
    return replace(corpus, validation=corpus.train)


def _counted(options: Any, context: Any, calls: list[int] = []) -> Corpus:  # noqa: B006  the fault: it remembers
    calls.append(0)
    return build_corpus(_documents(TEXTS[: 10 + len(calls)]), context)


SOURCE_FAULTS = [
    (lambda o, c: _documents(TEXTS), "returns_a_corpus"),
    (lambda o, c: replace(build_corpus(_documents(TEXTS), c), domains=("domain",)), "returns_a_corpus"),
    (_counted, "gives_the_same_again"),
    (lambda o, c: _both(build_corpus(_documents(TEXTS), c)), "holds_no_training_document_out"),
]


def test_a_sound_data_source_passes() -> None:
    testing.check_data_source(component("good", NoOptions, lambda o, c: build_corpus(_documents(TEXTS), c)))


@pytest.mark.parametrize(("fault", "check"), SOURCE_FAULTS)
def test_a_faulty_data_source_is_caught(fault: Any, check: str) -> None:
    with pytest.raises(testing.ConformanceError, match=check):
        testing.check_data_source(component("bad", NoOptions, fault))


def test_every_data_source_check_has_a_planted_fault() -> None:
    assert {check for _, check in SOURCE_FAULTS} == {c.__name__ for c in data_sources.DATA_SOURCE_CHECKS}


class GoodObserver:
    def __init__(self, options: Any, run_dir: Path) -> None:
        self.seen: list[int] = []

    def on_log(self, step: int, metrics: Any) -> None:
        self.seen.append(step)

    def on_train_end(self, step: int, error: BaseException | None) -> None:
        self.seen.append(step)


def _opens(self: Any, run_dir: Path) -> None:
    self.opened = [run_dir]


def _closes(self: Any, step: int) -> None:
    self.opened.clear()


class Forgets(GoodObserver):
    """Gives a file for the checkpoint, and can't read it again."""

    def on_checkpoint(self, step: int) -> dict[str, bytes]:
        return {"mine.json": b"1"}

    def on_train_begin(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            (checkpoint / "mine.json").read_text().index("2")


class Newcomer(GoodObserver):
    """Wants its file also where it was not in the config yet."""

    def on_checkpoint(self, step: int) -> dict[str, bytes]:
        return {"mine.json": b"1"}

    def on_train_begin(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            (checkpoint / "mine.json").read_text()


OBSERVER_FAULTS = [
    (lambda o, r: object(), "has_a_hook"),
    (type("Misspelt", (GoodObserver,), {"on_logg": lambda self, step: None}), "has_a_hook"),
    (type("Breaks", (GoodObserver,), {"on_evaluate": lambda self, step: 1 / 0}), "lives_through_a_run"),
    (type("Open", (GoodObserver,), {"on_train_begin": _opens, "on_train_end": _closes}), "lives_through_a_failure"),
    (type("AsksOnlyFinite", (GoodObserver,), {"on_log": lambda self, metrics: [int(x) for x in metrics.values()]}),
     "lives_through_a_run"),
    (Forgets, "goes_on_from_a_checkpoint"),
    (Newcomer, "goes_on_from_a_checkpoint"),
    (type("Edits", (GoodObserver,), {"on_train_begin": lambda self, config: config.clear()}), "changes_nothing"),
    (type("Takes", (GoodObserver,), {"on_log": lambda self, metrics: metrics.pop("train/loss")}), "changes_nothing"),
]  # fmt: skip


def test_a_sound_observer_passes() -> None:
    testing.check_observer(component("good", NoOptions, GoodObserver))


@pytest.mark.parametrize(("fault", "check"), OBSERVER_FAULTS)
def test_a_faulty_observer_is_caught(fault: Any, check: str) -> None:
    with pytest.raises(testing.ConformanceError, match=check):
        testing.check_observer(component("bad", NoOptions, fault))


def test_every_observer_check_has_a_planted_fault() -> None:
    caught = [check for _, check in OBSERVER_FAULTS]
    assert all(any(c.__name__.startswith(n) for n in caught) for c in observers.OBSERVER_CHECKS)


class GoodSurgery:
    """A sound surgery, which leaves everything as it is."""

    needs = frozenset({"load"})

    def __init__(self, options: Any, context: Any) -> None:
        self.context = context

    def plan(self, evidence: Any) -> Any:
        evidence.measured("load")
        experts = tuple(NewExpert((expert,)) for expert in range(self.context.layout.num_experts))
        return LayerPlan(experts, 2, self.context.layout.moe_intermediate_size, exact=True, because="nothing changes")


class NeedsWhatIsNot(GoodSurgery):
    needs = frozenset({"load", "fame"})


class NeedsMore(GoodSurgery):
    needs = frozenset()  # type: ignore[var-annotated]


class OutOfRange(GoodSurgery):
    def plan(self, evidence: Any) -> Any:
        return replace(super().plan(evidence), experts=(NewExpert((99,)),) * 3)


class MoreThanThere(GoodSurgery):
    def plan(self, evidence: Any) -> Any:
        return replace(super().plan(evidence), num_experts_per_tok=9)


class SaysNoWhy(GoodSurgery):
    def plan(self, evidence: Any) -> Any:
        return replace(super().plan(evidence), because=" ")


class ByChance(GoodSurgery):
    def plan(self, evidence: Any) -> Any:
        order = np.random.default_rng().permutation(8).tolist()
        return replace(super().plan(evidence), experts=tuple(NewExpert((e,)) for e in order))


class NotExact(GoodSurgery):
    def plan(self, evidence: Any) -> Any:
        return replace(super().plan(evidence), num_experts_per_tok=3)


SURGERY_FAULTS = [
    (NeedsWhatIsNot, "says_what_it_needs"),
    (NeedsMore, "plans_a_layer_that_can_be"),
    (OutOfRange, "plans_a_layer_that_can_be"),
    (MoreThanThere, "plans_a_layer_that_can_be"),
    (SaysNoWhy, "says_why"),
    (ByChance, "plans_the_same_again"),
    (NotExact, "keeps_the_function_where_it_says_so"),
]


def test_a_sound_surgery_passes() -> None:
    testing.check_surgery(component("good", NoOptions, GoodSurgery))


@pytest.mark.parametrize(("fault", "check"), SURGERY_FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_faulty_surgery_is_caught(fault: Any, check: str) -> None:
    with pytest.raises(testing.ConformanceError, match=check):
        testing.check_surgery(component("bad", NoOptions, fault))


def test_every_surgery_check_has_a_planted_fault() -> None:
    assert {check for _, check in SURGERY_FAULTS} == {check.__name__ for check in surgeries.SURGERY_CHECKS}
