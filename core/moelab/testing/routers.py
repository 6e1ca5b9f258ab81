"""What every router must do, whoever wrote it.

B sequences of S positions, T = B * S tokens, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moelab.components import Component
from moelab.errors import ConfigError
from moelab.moe import promises
from moelab.moe.batch_statistics import BatchStatistics, call_after_step
from moelab.moe.contracts import ExpectedAssignments, MoEContext, Router
from moelab.moe.routing import LayerRecord, Routing, TokenInfo
from moelab.plugin_faults import article
from moelab.testing.report import make_options, promised, run_checks
from moelab.testing.surgeries import rows_fault
from moelab.testing.tensors import (
    assert_close,
    assert_finite,
    dense_weights,
    fill_parameters,
    fresh_noise,
    host_waits,
    make_info,
    outcome,
    take,
    tensors_of,
)

CONTEXT = MoEContext(16, 8, 2, 12, 32, layer_id=1, num_hidden_layers=4, vocab_size=64)
BATCH, LENGTH = 3, 8


@dataclass
class RouterCase:
    """One router under test. `reference(x float64 [T, D], router, info) -> [T, E]` is its closed form, if declared."""

    component: Component[MoEContext, Router]
    options: Any = None  # an instance, a mapping, or None for the defaults
    context: MoEContext = CONTEXT
    reference: Callable[[Tensor, Any, TokenInfo], Tensor] | None = None
    seed: int = 0
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)
        stream = torch.Generator().manual_seed(self.seed + 7)
        self.x = torch.empty(BATCH * LENGTH, self.context.hidden_size).normal_(generator=stream)

    @cached_property
    def noncausal(self) -> bool:
        """It refuses to be built without `allow_noncausal`, so it may look at later tokens in training."""
        try:
            self.component.build(self.options, replace(self.context, allow_noncausal=False))
        except ConfigError:
            return True
        return False

    def build(self) -> Any:
        """A fresh router with strong, seeded parameters."""
        router: Any = self.component.build(self.options, replace(self.context, allow_noncausal=self.noncausal))
        promised(promises.router_built(router), router)
        fill_parameters(router, self.seed)
        return router

    def info(self, training: bool, batch: int = BATCH, length: int = LENGTH) -> TokenInfo:
        return make_info(batch, length, self.context.vocab_size, training=training, seed=self.seed)

    def route(self, router: Any, info: TokenInfo, x: Tensor | None = None) -> Routing:
        """Call the router and check that it answers with a Routing."""
        router.train(info.training)
        routing = router(self.x if x is None else x, info)
        promised(None if isinstance(routing, Routing) else f"returned {article(routing)}; {promises.ROUTING}", router)
        return routing

    def noisy(self) -> bool:
        """Another stream of noise changes its decisions in training."""
        router, info = self.build(), self.info(True)
        first, second = self.route(router, info), self.route(router, fresh_noise(info, 99))
        return not torch.equal(outcome(first), outcome(second))


def returns_what_the_contract_says(case: RouterCase) -> None:
    """Shapes, dtypes and ranges of every field."""
    for training in (False, True):
        router = case.build()
        routing = case.route(router, case.info(training))
        promised(promises.routing_shape(routing, case.x, case.context.num_experts), router)
        promised(promises.routing_values(routing, case.x), router)
        assert routing.weight.dtype == torch.float32, f"weight is {routing.weight.dtype}, not float32"
        for name in ("scores", "logits"):
            value = getattr(routing, name)
            assert value is None or value.dtype == torch.float32, f"{name} is {value.dtype}, not float32"


def serves_as_it_decides(case: RouterCase) -> None:
    """What it offers for generation, `serving`, decides as a call in evaluation does."""
    router, info = case.build().eval(), case.info(False)
    served = getattr(router, "serving", lambda: None)() or router
    assert torch.equal(outcome(served(case.x, info)), outcome(router(case.x, info))), "`serving` decides otherwise"


def gives_no_expert_twice_to_a_token(case: RouterCase) -> None:
    """Pairs of token and expert are distinct."""
    for training in (False, True):
        routing = case.route(case.build(), case.info(training)).compact()
        pairs = routing.token * routing.num_experts + routing.expert
        assert pairs.unique().numel() == pairs.numel(), "a token has the same expert twice"


def matches_its_closed_form(case: RouterCase) -> None:
    """Where one is declared: the weights equal the float64 reference to 1e-6."""
    if case.reference is not None:
        router, info = case.build(), case.info(False)
        with torch.no_grad():
            expected = case.reference(case.x.double(), copy.deepcopy(router).double(), info)
            assert_close(dense_weights(case.route(router, info)), expected, "weights against the closed form")


def does_the_same_again(case: RouterCase) -> None:
    """Two calls on the same tokens agree, noise included: layers are recomputed in the backward pass."""
    for training in (False, True):
        router, info = case.build(), case.info(training)
        first, second = case.route(router, info), case.route(router, info)
        assert torch.equal(outcome(first), outcome(second)), (
            f"two calls disagree (training={training}); draw noise from moelab.moe.gate.noise_generator(info, ...)"
        )


def keeps_nothing_of_a_batch(case: RouterCase) -> None:
    """Neither tensors on the module nor changed state: a layer may be run twice or not at all."""
    for training in (False, True):
        router, info = case.build(), case.info(training)
        state = {key: value.clone() for key, value in router.state_dict().items()}
        hanging = set(tensors_of(router))
        case.route(router, info)
        new = sorted(set(tensors_of(router)) - hanging)
        assert not new, f"keeps {new[0]} on the module"
        changed = [key for key, value in router.state_dict().items() if not torch.equal(value, state[key])]
        assert not changed, f"forward changed '{changed[0]}'; do it in after_step"


def padding_changes_nothing(case: RouterCase) -> None:
    """What padding holds reaches no other token, and is counted nowhere."""
    router = case.build()
    for training in (False, True):
        mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        mask[0, -3:] = False
        mask[1, -1:] = False
        info = replace(case.info(training), mask=mask.view(-1))
        other = torch.where(info.valid().unsqueeze(-1), case.x, -3 * case.x + 1)
        ids = torch.where(info.valid(), info.token_id, (info.token_id + 1) % case.context.vocab_size)
        first, second = case.route(router, info), case.route(router, replace(info, token_id=ids), other)
        assert first.token_mask is not None, "token_mask is not set: hand on info.mask"
        assert torch.equal(first.token_mask, info.valid()), "token_mask is not info.mask"
        assert_close(outcome(first)[info.valid()], outcome(second)[info.valid()], "real tokens, when padding changes")
        assert torch.equal(first.demand(), second.demand()), "padding is counted"
        if first.statistics is not None and second.statistics is not None:
            assert_close(first.statistics, second.statistics, "statistics, when padding changes")


def right_padding_changes_nothing(case: RouterCase) -> None:
    """A padded batch routes its real tokens as the unpadded one does."""
    router = case.build()
    noisy = case.noisy()
    for training in (False, True):
        if training and noisy:
            continue  # other shapes draw other noise
        info = case.info(training)
        rows = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
        longer = torch.cat([rows, rows[:, :2]], dim=1).reshape(-1)
        padded = take(info, longer, BATCH)
        mask = torch.ones(BATCH, LENGTH + 2, dtype=torch.bool)
        mask[:, LENGTH:] = False
        padded = replace(padded, mask=mask.view(-1), position=torch.arange(LENGTH + 2).repeat(BATCH))
        short, long = case.route(router, info), case.route(router, padded, case.x[longer])
        assert_close(outcome(long)[mask.view(-1)], outcome(short), f"real tokens, when padded (training={training})")
        assert torch.equal(long.demand(), short.demand()), "counts change with padding"


def sequences_are_apart(case: RouterCase) -> None:
    """A sequence is routed alone as it is in a batch, and in causal evaluation a token as it is in its sequence."""
    router = case.build()
    info = case.info(False)
    whole = outcome(case.route(router, info))
    token = [torch.tensor([LENGTH + 3])] if _causal(router, False) else []
    for rows in (torch.arange(LENGTH, 2 * LENGTH), *token):
        alone = outcome(case.route(router, take(info, rows, 1), case.x[rows]))
        assert_close(alone, whole[rows], "routed alone or in a batch, in evaluation")
    if promises.batch_invariant(router):
        info, rows = case.info(True), torch.arange(LENGTH, 2 * LENGTH)
        whole = outcome(case.route(router, info))
        alone = outcome(case.route(router, fresh_noise(take(info, rows, 1), 99), case.x[rows]))
        told = "routed alone or in a batch, in training; one that noise or the batch moves says batch_invariant = False"
        assert_close(alone, whole[rows], told)


def later_tokens_change_nothing(case: RouterCase) -> None:
    """Causality, where it does not say otherwise: `causal` in training, `causal_in_evaluation`."""
    router = case.build()
    cut = LENGTH // 2
    for training in (False, True):
        if not _causal(router, training):
            continue
        info = case.info(training)
        later = info.position >= cut
        other = torch.where(later.unsqueeze(-1), case.x.flip(1) * 2 - 1, case.x)
        ids = torch.where(later, (info.token_id + 5) % case.context.vocab_size, info.token_id)
        first, second = case.route(router, info), case.route(router, replace(info, token_id=ids), other)
        assert_close(
            outcome(second)[~later], outcome(first)[~later],
            f"earlier tokens, when later ones change (training={training}); refuse without context.allow_noncausal",
        )  # fmt: skip


def says_whether_it_is_causal(case: RouterCase) -> None:
    """`causal = False` (or `causal_in_evaluation`) and refusing to be built without `allow_noncausal` go together."""
    router = case.build()
    said = not (_causal(router, True) and _causal(router, False))
    assert said == case.noncausal, (
        "sets causal = False, and can be built without context.allow_noncausal; refuse that (refuse_noncausal)"
        if said
        else "refuses to be built without context.allow_noncausal, and does not set causal = False"
    )


def _causal(router: Any, training: bool) -> bool:
    return bool(getattr(router, "causal" if training else "causal_in_evaluation", True))


def gradients_reach_the_router(case: RouterCase) -> None:
    """Every parameter hears from what it returns in training, and so does x when there is a parameter."""
    router, info = case.build(), case.info(True)
    if not list(router.parameters()):
        return
    x = case.x.clone().requires_grad_()
    below = case.route(router, info, case.x)
    routing = case.route(router, replace(info, previous=below), x)
    parts = [routing.weight, routing.scores, routing.logits, routing.bypass, *routing.extras.values()]
    assert routing.weight.requires_grad, "weight has no gradient"
    total = torch.zeros(())
    for index, part in enumerate(parts):
        if part is not None and part.requires_grad:
            total = total + (part * torch.linspace(0.5, 1.5 + index, part.numel()).view_as(part)).sum()
    total.backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches '{name}'"
        assert_finite(parameter.grad, f"the gradient of '{name}'")
        assert bool((parameter.grad != 0).any()), f"the gradient of '{name}' is all zero"
    assert x.grad is not None, "no gradient reaches x"
    assert_finite(x.grad, "the gradient of x")


def state_is_saved_and_restored(case: RouterCase) -> None:
    """After steps, a fresh router with the saved state routes alike, now and after further steps."""
    router = case.build()
    _steps(case, router, 3)
    other = case.build()
    other.load_state_dict(router.state_dict())
    info = case.info(False)
    for _ in range(2):
        first, second = case.route(router, info), case.route(other, info)
        assert torch.equal(outcome(first), outcome(second)), "a restored router routes differently: state is not saved"
        for instance in (router, other):
            _steps(case, instance, 2)


def stays_float32_in_a_bfloat16_model(case: RouterCase) -> None:
    """Under .to(bfloat16) buffers stay float32 and weights come in float32; under autocast decisions don't change."""
    router = case.build()
    plain = case.route(router, case.info(False))
    with torch.autocast("cpu", torch.bfloat16):
        autocast = case.route(router, case.info(False))
    assert autocast.weight.dtype == torch.float32, f"weight is {autocast.weight.dtype} under autocast, not float32"
    assert_close(outcome(autocast), outcome(plain), "decisions under autocast")
    router.to(torch.bfloat16)
    for name, buffer in router.named_buffers():
        assert buffer.dtype != torch.bfloat16, f"buffer '{name}' became bfloat16; see moelab.moe.gate.keeping_float32"
    routing = case.route(router, case.info(True), case.x.bfloat16())
    assert routing.weight.dtype == torch.float32, f"weight is {routing.weight.dtype} for bfloat16 input, not float32"


def nothing_waits_for_the_device(case: RouterCase) -> None:
    """No operation in forward asks for a value or for a shape that depends on values."""
    router = case.build()
    for training in (False, True):
        mask = torch.ones(BATCH * LENGTH, dtype=torch.bool)
        mask[-2:] = False
        info = replace(case.info(training), mask=mask)
        router.train(training)
        found = host_waits(lambda info=info: router(case.x, info))  # type: ignore[misc]
        assert not found, f"{found[0]} waits for the device (training={training})"


def few_tokens_are_routed(case: RouterCase) -> None:
    """One token, and none; and a batch that is all padding."""
    router = case.build()
    for training in (False, True):
        for batch, length in ((1, 1), (1, 0)):
            routing = case.route(router, case.info(training, batch, length), case.x[: batch * length])
            assert routing.num_tokens == batch * length, f"{batch * length} tokens became {routing.num_tokens}"
            assert_finite(routing.weight, f"weight for {batch * length} tokens")
        padding = replace(case.info(training), mask=torch.zeros(BATCH * LENGTH, dtype=torch.bool))
        routing = case.route(router, padding)
        assert int(routing.demand().sum()) == 0, "padding is counted when all is padding"
        assert_finite(routing.statistics, "statistics of padding alone")


def extremes_stay_finite(case: RouterCase) -> None:
    """Zero input, huge input, a router that starves experts: no NaN in weights, scores, state or gradients."""
    for scale, bias in ((0.0, 0.0), (1e4, 0.0), (0.0, -1e3), (0.0, 1e3)):
        router, info = case.build(), case.info(True)
        x = (case.x * scale + bias).requires_grad_()
        routing = case.route(router, info, x)
        for name in ("weight", "scores", "logits", "bypass", "statistics"):
            assert_finite(getattr(routing, name), f"{name} for input of {scale} x + {bias}")
        parts = [part for part in (routing.weight, routing.bypass) if part is not None and part.requires_grad]
        if parts:
            sum((part.sum() for part in parts), torch.zeros(())).backward()
            assert_finite(x.grad, f"the gradient for input of {scale} x + {bias}")
        after_step = getattr(router, "after_step", None)
        if after_step is not None:
            after_step(torch.zeros_like(routing.demand()))
            for name, buffer in router.named_buffers():
                assert_finite(buffer, f"buffer '{name}' after a step without tokens")


def declares_what_it_can_serve(case: RouterCase) -> None:
    """`expected_assignments`, where there is one, lies in 0 .. E and says why."""
    declared = getattr(case.build(), "expected_assignments", None)
    if declared is None:
        return
    assert isinstance(declared, ExpectedAssignments), f"expected_assignments is {declared!r}, no ExpectedAssignments"
    assert 0 <= declared.per_token <= case.context.num_experts, f"expects {declared.per_token} experts a token"
    assert declared.because, "expected_assignments does not say why"


def its_rows_follow_its_experts(case: RouterCase) -> None:
    """`expert_rows`, where declared, names the tensors that have a row for each expert; no other depends on them."""
    more, built = case.context.num_experts, case.build()
    try:
        larger = replace(case.context, num_experts=2 * more, allow_noncausal=case.noncausal)
        promised(rows_fault(built, case.component.build(case.options, larger), more), built)
    except ConfigError:  # it does not take that many
        return


ROUTER_CHECKS: tuple[Callable[[RouterCase], None], ...] = (
    returns_what_the_contract_says,
    gives_no_expert_twice_to_a_token,
    serves_as_it_decides,
    matches_its_closed_form,
    does_the_same_again,
    keeps_nothing_of_a_batch,
    padding_changes_nothing,
    right_padding_changes_nothing,
    sequences_are_apart,
    later_tokens_change_nothing,
    says_whether_it_is_causal,
    gradients_reach_the_router,
    state_is_saved_and_restored,
    stays_float32_in_a_bfloat16_model,
    nothing_waits_for_the_device,
    few_tokens_are_routed,
    extremes_stay_finite,
    declares_what_it_can_serve,
    its_rows_follow_its_experts,
)


def check_router(
    component: Component[MoEContext, Router],
    options: Any = None,
    context: MoEContext = CONTEXT,
    reference: Callable[[Tensor, Any, TokenInfo], Tensor] | None = None,
) -> None:
    """Run every check of ROUTER_CHECKS; raises ConformanceError naming those that fail."""
    run_checks("router", component, RouterCase(component, options, context, reference), ROUTER_CHECKS)


def _steps(case: RouterCase, router: Any, count: int) -> None:
    """`count` training batches, each followed by the router's own step as the trainer makes it."""
    if not hasattr(router, "after_step"):
        return
    for step in range(count):
        statistics = BatchStatistics()
        routing = case.route(router, fresh_noise(case.info(True), step))
        statistics.add([LayerRecord(case.context.layer_id, routing, routing.counts(), demand=routing.demand())])
        mean = statistics.mean_statistics(case.context.layer_id)
        counts = statistics.wanted[case.context.layer_id]
        call_after_step(router.after_step, counts, mean, step)
