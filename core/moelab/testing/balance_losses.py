"""What every balance loss must do.

B sequences of S positions, T = B * S tokens, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from moelab.components import Component
from moelab.errors import ConfigError
from moelab.moe import promises
from moelab.moe.balance import NamedLoss
from moelab.moe.batch_statistics import BatchStatistics
from moelab.moe.contracts import BalanceContext, BalanceLoss, BalanceLossContext, MoEContext, Router
from moelab.moe.layout import ExpertLayout
from moelab.moe.routing import LayerRecord, Routing, TokenInfo
from moelab.moe.selection import softmax_score
from moelab.moe.topk import TopKOptions, TopKRouter
from moelab.testing.report import make_options, promised, run_checks
from moelab.testing.routers import CONTEXT
from moelab.testing.tensors import assert_close, assert_finite, fill_parameters, host_waits, make_info, take

BATCH, LENGTH, LAYERS = 4, 6, 2


@dataclass
class BalanceLossCase:
    """One loss under test, on the records of `router` (None: a plain softmax top-K).

    `balanced`: its value when every expert has the same load and every token the same score for each, if declared.
    """

    component: Component[BalanceLossContext, BalanceLoss]
    options: Any = None
    router: Component[MoEContext, Router] | None = None
    router_options: Any = None
    context: MoEContext = CONTEXT
    balanced: float | None = None

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)
        if self.router is not None:
            self.router_options = make_options(self.router, self.router_options)
        stream = torch.Generator().manual_seed(11)
        self.x = torch.empty(BATCH * LENGTH, self.context.hidden_size).normal_(generator=stream)
        self.layout = ExpertLayout(
            self.context.num_experts, self.context.num_experts_per_tok, self.context.moe_intermediate_size
        )

    def build(self, options: Any = None) -> Any:
        """A fresh loss for `LAYERS` layers."""
        layouts = dict.fromkeys(range(LAYERS), self.layout)
        return self.component.build(options or self.options, BalanceLossContext(layouts))

    def routers(self) -> list[Any]:
        """One router a layer, with strong, seeded parameters that differ."""
        made: list[Any] = []
        for layer in range(LAYERS):
            context = replace(self.context, layer_id=layer, allow_noncausal=True)
            if self.router is None:
                router: Any = TopKRouter(TopKOptions(), context, softmax_score)
            else:
                router = self.router.build(self.router_options, context)
            fill_parameters(router, layer, std=0.4)
            made.append(router)
        return made

    def info(self, padded: bool = True) -> TokenInfo:
        """A batch in which, if `padded`, sequences have 6, 4, 5 and 2 tokens."""
        info = make_info(BATCH, LENGTH, self.context.vocab_size, training=True)
        if not padded:
            return info
        length = torch.tensor([6, 4, 5, 2])[info.sequence_id]
        return replace(info, mask=info.position < length)

    def records(self, routers: Sequence[Any], x: Tensor, info: TokenInfo) -> list[LayerRecord]:
        """What a model would hand to the loss: one record a layer, with experts of its own."""
        made = []
        for layer, router in enumerate(routers):
            routing: Routing = router(x, info)
            counts, width, hidden = routing.counts(), self.context.moe_intermediate_size, self.context.hidden_size
            stream = torch.Generator().manual_seed(layer)
            bank = torch.empty(self.context.num_experts, 3 * width, hidden).normal_(generator=stream)
            bank = nn.Parameter(bank) if x.requires_grad else bank
            weight = getattr(router, "weight", None)
            gate_up, down = bank[:, : 2 * width], bank[:, 2 * width :]
            made.append(LayerRecord(layer, routing, counts, weight, routing.demand(), info, gate_up, down))
        return made

    def whole(self, loss: Any, records: Sequence[LayerRecord]) -> BalanceContext:
        """What a loss is told of a batch that consists of these records."""
        named = NamedLoss("loss", loss)
        statistics = BatchStatistics([named])
        statistics.add(records)
        return statistics.context(named)

    def value(self, loss: Any, records: Sequence[LayerRecord], context: BalanceContext | None = None) -> Tensor:
        """The loss of the records; as a batch of their own when there is no context."""
        if context is None:
            context = self.whole(loss, records)
        value = loss(records, context)
        promised(promises.loss_value(value), loss)
        assert isinstance(value, Tensor)
        return value


def returns_a_finite_scalar(case: BalanceLossCase) -> None:
    """A float scalar, on ordinary, collapsed and wholly padded batches."""
    routers, loss = case.routers(), case.build()
    everything_padded = replace(case.info(), mask=torch.zeros(BATCH * LENGTH, dtype=torch.bool))
    for x, info in (
        (case.x, case.info()),
        (case.x * 0 + 1e3, case.info()),
        (case.x * 0, case.info()),
        (case.x, everything_padded),
    ):
        value = case.value(loss, case.records(routers, x, info))
        assert_finite(value, "value")


def says_its_weight_and_does_not_apply_it(case: BalanceLossCase) -> None:
    """`weight` and `needs_batch_counts` are there; the coefficient is the trainer's to apply."""
    loss = case.build()
    promised(promises.loss_built(loss), loss)
    if "weight" in {f.name for f in fields(case.options)}:
        other = case.build(replace(case.options, weight=case.options.weight * 3 + 1))
        records = case.records(case.routers(), case.x, case.info())
        assert_close(case.value(other, records), case.value(loss, records), "value under another weight")


def padding_changes_nothing(case: BalanceLossCase) -> None:
    """What padding holds changes neither value nor gradient, and gets no gradient."""
    routers, loss, info = case.routers(), case.build(), case.info()
    values = []
    for content in (case.x, torch.where(info.valid().unsqueeze(-1), case.x, case.x.flip(1) * 4)):
        x = content.clone().requires_grad_()
        value = case.value(loss, case.records(routers, x, info))
        values.append(value.detach())
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, [x], allow_unused=True)
            if gradient is not None:
                assert not bool((gradient[~info.valid()] != 0).any()), "padding gets a gradient"
    assert_close(values[1], values[0], "value, when padding changes")


def a_copied_batch_costs_the_same(case: BalanceLossCase) -> None:
    """The loss is a mean over tokens: the batch twice over has the value of the batch."""
    if case.router is not None:
        return  # a router with noise draws other noise for twice the tokens
    routers, loss, info = case.routers(), case.build(), case.info(padded=False)
    rows = torch.arange(BATCH * LENGTH).repeat(2)
    double = take(info, rows, 2 * BATCH)
    double = replace(double, sequence_id=torch.arange(2 * BATCH).repeat_interleave(LENGTH))
    once = case.value(loss, case.records(routers, case.x, info))
    assert_close(case.value(loss, case.records(routers, case.x[rows], double)), once, "value of the batch twice over")


def layers_are_averaged(case: BalanceLossCase) -> None:
    """Two equal layers cost what one does, so that a coefficient means the same at any depth."""
    records = case.records([case.routers()[0]] * LAYERS, case.x, case.info())
    records[1] = replace(records[0], layer_id=1)
    loss = case.build()
    one = case.component.build(case.options, BalanceLossContext({0: case.layout}))
    assert_close(case.value(loss, records), case.value(one, records[:1]), "value of two equal layers against one")


def a_split_changes_nothing(case: BalanceLossCase) -> None:
    """Micro-batches, each by its share of tokens, sum to the batch: value and gradient.

    A loss that can't promise it says `split_invariant = False`.
    """
    loss = case.build()
    if not getattr(loss, "split_invariant", True):
        return
    results = []
    for parts in ([(0, 4)], [(0, 2), (2, 4)], [(0, 1), (1, 4)]):
        routers, info = case.routers(), case.info()
        context = case.whole(loss, case.records(routers, case.x, info))
        total = torch.zeros(())
        for first, last in parts:
            rows = torch.arange(first * LENGTH, last * LENGTH)
            part = take(info, rows, last - first)
            share = float(part.valid().sum()) / float(info.valid().sum())
            total = total + share * case.value(loss, case.records(routers, case.x[rows], part), context)
        gradient = torch.zeros(())
        if total.requires_grad:
            total.backward()
            found = [p.grad.flatten() for router in routers for p in router.parameters() if p.grad is not None]
            gradient = torch.cat(found) if found else gradient
        results.append((total.detach(), gradient))
    for value, gradient in results[1:]:
        assert_close(value, results[0][0], "value of micro-batches against the whole; or say split_invariant = False")
        assert_close(gradient, results[0][1], "gradient of micro-batches against the whole")


def a_gradient_reaches_the_layer(case: BalanceLossCase) -> None:
    """Some parameter of the router or the experts hears of it, finitely."""
    routers = case.routers()
    records = case.records(routers, case.x.clone().requires_grad_(), case.info())
    value = case.value(case.build(), records)
    assert value.requires_grad, "has no gradient"
    value.backward()
    found = [p.grad for router in routers for p in router.parameters() if p.grad is not None]
    if not found:
        return  # it trains the experts, which the records hold
    for gradient in found:
        assert_finite(gradient, "a router's gradient")
    assert any(bool((gradient != 0).any()) for gradient in found), "its gradient is all zero"


def says_so_when_something_is_missing(case: BalanceLossCase) -> None:
    """A router without scores, logits, extras or weight: it works, or raises ConfigError naming the layer."""
    loss = case.build()
    full = case.records(case.routers(), case.x, case.info())
    everything: dict[str, Any] = {"scores": None, "logits": None, "extras": {}}
    for gone in (*({key: value} for key, value in everything.items()), everything):
        records = [replace(r, routing=replace(r.routing, **gone)) for r in full]
        try:
            case.value(loss, records)
        except ConfigError as error:
            if "layer 0" not in str(error):
                raise AssertionError(f"does not name the layer: {error}") from error
        except Exception as error:
            said = f"raised {type(error).__name__} for a router that gives no {' and '.join(gone)}"
            raise AssertionError(f"{said}; do without, or raise moelab.ConfigError naming the layer") from error


def steps_and_state_are_sound(case: BalanceLossCase) -> None:
    """`after_step` survives a batch without tokens, and what it changes is in `state_dict`."""
    loss = case.build()
    records = case.records(case.routers(), case.x, case.info())
    if not hasattr(loss, "after_step"):
        return
    context = case.whole(loss, records)
    for _ in range(3):
        loss.after_step(context)
    zeros = {layer: torch.zeros_like(counts) for layer, counts in (context.batch_choices or {}).items()}
    loss.after_step(BalanceContext(zeros, torch.zeros((), dtype=torch.int64)))
    other = case.build()
    if loss.weight != other.weight:
        assert hasattr(loss, "state_dict"), "after_step changes `weight`, and there is no state_dict"
        other.load_state_dict(loss.state_dict())
        assert loss.weight == other.weight, "a restored loss has another weight: state is not saved"


def waits_for_nothing(case: BalanceLossCase) -> None:
    """No operation asks for a value or for a shape that depends on values."""
    loss = case.build()
    records = case.records(case.routers(), case.x, case.info())
    context = case.whole(loss, records)
    found = host_waits(lambda: (case.whole(loss, records), loss(records, context)))
    assert not found, f"{found[0]} waits for the device"


def has_its_value_at_balance(case: BalanceLossCase) -> None:
    """Where one is declared: equal scores, equal loads."""
    if case.balanced is None:
        return
    experts, top_k = case.context.num_experts, case.context.num_experts_per_tok
    tokens = experts * 3
    turn = (torch.arange(tokens)[:, None] * top_k + torch.arange(top_k)) % experts
    zeros = torch.zeros(tokens, experts)
    routing = Routing.from_topk(
        turn, torch.full(turn.shape, 1 / top_k), experts, scores=zeros.softmax(-1), logits=zeros
    )
    info = make_info(3, experts, 8, training=True)
    records = [LayerRecord(layer, routing, routing.counts(), info=info) for layer in range(LAYERS)]
    assert_close(case.value(case.build(), records), torch.tensor(case.balanced), "value at balance")


BALANCE_LOSS_CHECKS: tuple[Callable[[BalanceLossCase], None], ...] = (
    returns_a_finite_scalar,
    says_its_weight_and_does_not_apply_it,
    padding_changes_nothing,
    a_copied_batch_costs_the_same,
    layers_are_averaged,
    a_split_changes_nothing,
    a_gradient_reaches_the_layer,
    says_so_when_something_is_missing,
    steps_and_state_are_sound,
    waits_for_nothing,
    has_its_value_at_balance,
)


def check_balance_loss(
    component: Component[BalanceLossContext, BalanceLoss],
    options: Any = None,
    *,
    router: Component[MoEContext, Router] | None = None,
    router_options: Any = None,
    balanced: float | None = None,
) -> None:
    """Run every check of BALANCE_LOSS_CHECKS; raises ConformanceError naming those that fail."""
    case = BalanceLossCase(component, options, router, router_options, balanced=balanced)
    run_checks("balance loss", component, case, BALANCE_LOSS_CHECKS)
