"""One optimizer step: micro-batches in, one update out. The sum over micro-batches is the whole batch's loss.

Every term is a mean over tokens, scaled by the micro-batch's share of the batch's tokens; a loss that needs
the load of the whole batch gets it from a routing pass over all micro-batches first. So neither the split nor
padding changes the update (up to the order of floating-point sums).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from moelab.data.batches import Batch
from moelab.moe.balance import NamedLoss
from moelab.moe.batch_statistics import BatchStatistics
from moelab.moe.routing import LayerRecord
from moelab.nn.count import moe_blocks
from moelab.nn.transformer import TokenContext, Transformer
from moelab.parallel.ranks import ALONE, Ranks
from moelab.seeds import derive_seed, generator
from moelab.training.adapters import Adapters
from moelab.training.failure import NotFinite, Terms, describe_failure
from moelab.training.objective import TEXT, Objective, Place
from moelab.training.precision import Precision
from moelab.training.router_statistics import RouterStatistics


@dataclass(frozen=True)
class StepSettings:
    """What stays the same from step to step."""

    micro_batch_size: int
    grad_clip: float
    seed: int
    precision: Precision
    objective: Objective = TEXT  # what is learned of a micro-batch
    head: nn.Module | None = None  # the model with one more head, where the optimizer trains that too


@dataclass(frozen=True)
class Observe:
    """What a step gathers beside its losses, on the steps that are logged."""

    routing: bool = False  # router statistics
    gradient_shares: bool = False  # of each loss in the routers' gradient: a backward pass for each term


NOTHING = Observe()


@dataclass
class Update:
    """Whether an update is under way: in between, model, optimizer and plugins' state are of neither step."""

    under_way: bool = False


@dataclass(frozen=True)
class StepResult:
    """What a step found, still on the device."""

    losses: dict[str, Tensor]  # {"loss", "lm_loss", <balance loss>: unweighted}, scalars
    grad_norm: Tensor
    statistics: RouterStatistics  # empty unless observed
    router_norms: Tensor | None  # [MoE layers] L2 norm of each router's gradient, before clipping; None unless observed
    gradient_norms: dict[str, Tensor]  # {loss: [MoE layers] the same of one term}, of the first micro-batch; as above
    served: Tensor | None  # [sum of E] int64: assignments served, layer after layer, without padding; None: dense


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    balance_losses: Sequence[NamedLoss],
    batch: Batch,
    step: int,
    settings: StepSettings,
    *,
    observe: Observe = NOTHING,
    update: Update | None = None,
    ranks: Ranks = ALONE,
    adapters: Adapters | None = None,  # what `optimizer` trains in place of the model's parameters
) -> StepResult:
    """Forward, backward, clip, update, and the routers' own `after_step`.

    `batch` is the whole one; of its micro-batches each of the `ranks` computes its own, and all end with one result.

    Raises NotFinite naming the step and the place when the loss or a gradient is not finite; the parameters are those
    of the last good step then. `update` is under way from when the first of them changes; who counts the step ends it.
    """
    ranks.begin(model)
    whole = batch.split(settings.micro_batch_size)
    parts = [(index, part.to(next(model.parameters()).device)) for index, part in ranks.own(whole)]
    targets = settings.objective.begin(batch, observe.routing)
    model.train()
    optimizer.zero_grad(set_to_none=True)
    # Re-seeded at each step: a plugin that draws from torch's global stream resumes exactly too.
    torch.manual_seed(derive_seed(settings.seed, "step", step))

    routers = router_parameters(model) if observe.routing or observe.gradient_shares else []
    before = _routing_pass(model, balance_losses, parts, step, settings, ranks)
    sizes = [part.token_count / batch.token_count for part in whole]
    computing = [
        partial(batch_terms, model, balance_losses, part, before, Place(step, i, sizes[i], targets), settings, ranks)
        for i, part in parts
    ]
    sums = _Sums(BatchStatistics(balance_losses))
    for index, compute in enumerate(computing):
        terms, records = compute()
        if index == 0 and observe.gradient_shares:
            sums.by_term = ranks.router_norms(_weighted(terms), routers, model)
        ranks.accumulate(model, last=index + 1 == len(computing))
        sums.add(terms, records, observe)
    losses = dict(zip(sums.losses, ranks.sum(torch.stack(list(sums.losses.values()))).unbind(), strict=True))
    learner = adapters or settings.head or model
    norm = ranks.gradient_norm(learner.parameters())
    if not bool(torch.isfinite(losses["loss"] + norm)):  # before clipping, which would make every gradient NaN
        raise NotFinite(describe_failure(model, step, computing, ranks, adapters))
    learning = [adapters.of(group) for group in routers] if adapters else routers
    router_norms = _gradient_norms(learning, ranks) if observe.routing and routers else None
    if settings.grad_clip:
        ranks.clip(learner.parameters(), settings.grad_clip, norm)
    sums.seen.reduce(ranks.sum)
    served = ranks.sum(torch.stack(sums.served).sum(0)) if sums.served else None
    (update or Update()).under_way = True
    optimizer.step()
    sums.seen.after_step(moe_blocks(model), step)
    for named in balance_losses:
        named.after_step(sums.seen.context(named))
    return StepResult(losses, norm, sums.statistics, router_norms, sums.by_term, served)


@dataclass
class _Sums:
    """What grows micro-batch by micro-batch, beside the gradients."""

    seen: BatchStatistics
    losses: dict[str, Tensor] = field(default_factory=dict)
    by_term: dict[str, Tensor] = field(default_factory=dict)  # of the first one
    statistics: RouterStatistics = field(default_factory=RouterStatistics)
    served: list[Tensor] = field(default_factory=list)

    def add(self, terms: Terms, records: Sequence[LayerRecord], observe: Observe) -> None:
        """Backward, and the sums."""
        loss = torch.stack(list(_weighted(terms).values())).sum()
        loss.backward()
        self.seen.add(records)
        self.served += [torch.cat([record.counts for record in records])] if records else []
        if observe.routing:
            self.statistics.add(records)
        found = {name: value.detach() for name, (value, _) in terms.items()} | {"loss": loss.detach()}
        self.losses = {name: self.losses.get(name, 0) + value for name, value in found.items()}


def _weighted(terms: Terms) -> dict[str, Tensor]:
    return {name: value * weight for name, (value, weight) in terms.items()}


def batch_terms(
    model: Transformer,
    balance_losses: Sequence[NamedLoss],
    part: Batch,
    before: BatchStatistics | None,
    place: Place,
    settings: StepSettings,
    ranks: Ranks = ALONE,
) -> tuple[Terms, list[LayerRecord]]:
    """The micro-batch's contributions to the batch's loss: {name: (unweighted scalar, coefficient)}."""
    with settings.precision.autocast():
        tokens = _token_context(part, place.step, place.index, settings.seed)
        terms, records = settings.objective.terms(model, part, tokens, place)
    if before is None:
        before = BatchStatistics(balance_losses)
        before.add(records)
        if ranks.size > 1 and any(named.loss.needs_batch_counts for named in balance_losses):
            before.reduce(ranks.sum)  # one micro-batch a rank: no pass has counted the batch
    for named in balance_losses:
        value = named(records, before.context(named))
        terms[named.name] = (value * place.share, named.weight_at(place.step))
    return terms, records


@torch.no_grad()
def _routing_pass(
    model: Transformer,
    balance_losses: Sequence[NamedLoss],
    parts: Sequence[tuple[int, Batch]],
    step: int,
    settings: StepSettings,
    ranks: Ranks,
) -> BatchStatistics | None:
    """The load of each layer over all micro-batches, when a loss needs it before the first backward pass.

    Costs one forward pass without the head; with a single micro-batch on each rank their own counts serve (None).
    """
    if len(parts) == 1 or not any(named.loss.needs_batch_counts for named in balance_losses):
        return None
    statistics = BatchStatistics(balance_losses)
    for index, part in parts:
        with settings.precision.autocast():
            context = _token_context(part, step, index, settings.seed)
            statistics.add(model(part.input_ids, part.attention_mask, tokens=context, head=False).records)
    statistics.reduce(ranks.sum)
    return statistics


def _token_context(part: Batch, step: int, index: int, seed: int) -> TokenContext:
    noise = generator(seed, "routing noise", step, index, device=part.input_ids.device)
    return TokenContext(part.document_id, part.domain_id, noise, attention_id=part.attention_id)


def router_parameters(model: Transformer) -> list[list[nn.Parameter]]:
    """The trainable parameters of each MoE layer's router, in the order of the layers; none for one without."""
    routers = [block.router for block in moe_blocks(model)]
    return [
        [p for p in router.parameters() if p.requires_grad] if isinstance(router, nn.Module) else []
        for router in routers
    ]


@torch.no_grad()
def _gradient_norms(groups: Sequence[Sequence[nn.Parameter]], ranks: Ranks) -> Tensor:
    """[groups] fp32: L2 norm of each group's gradient; 0 where it got none. Alone it waits for no device."""
    nothing = torch.zeros((), device=next((p.device for group in groups for p in group), None))
    reached = [[p for p in group if p.grad is not None] for group in groups]
    return torch.stack([ranks.gradient_norm(group).float() if group else nothing for group in reached])
