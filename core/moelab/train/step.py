"""One optimizer step: micro-batches in, one update out. The sum over micro-batches is the whole batch's loss.

Every term is a mean over tokens, scaled by the micro-batch's share of the batch's tokens; a loss that needs
the load of the whole batch gets it from a routing pass over all micro-batches first. So neither the split nor
padding changes the update (up to the order of floating-point sums).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab.builder import NamedLoss
from moelab.data.batches import Batch
from moelab.errors import RunFailure
from moelab.moe.block import MoEBlock
from moelab.moe.contracts import BalanceContext
from moelab.moe.routing import LayerRecord
from moelab.nn.transformer import TokenContext, Transformer
from moelab.seeds import derive_seed, generator
from moelab.train.failure import describe_failure
from moelab.train.precision import Precision
from moelab.train.router_statistics import RouterStatistics


@dataclass(frozen=True)
class StepSettings:
    """What stays the same from step to step."""

    micro_batch_size: int
    grad_clip: float
    seed: int
    precision: Precision


@dataclass(frozen=True)
class StepResult:
    """What a step found, still on the device."""

    losses: dict[str, Tensor]  # {"loss", "lm_loss", <balance loss>: unweighted}, scalars
    grad_norm: Tensor
    statistics: RouterStatistics  # empty unless the step was observed


@dataclass(frozen=True)
class _Place:
    """Where a micro-batch stands in its batch."""

    step: int
    index: int
    share: float  # of the batch's unmasked tokens
    targets: int  # of the whole batch


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    balance_losses: Sequence[NamedLoss],
    batch: Batch,
    step: int,
    settings: StepSettings,
    *,
    observe: bool = False,
) -> StepResult:
    """Forward, backward, clip, update, and the routers' own `after_step`; `observe` also gathers router statistics.

    Raises RunFailure naming the step and the layer when the loss or a gradient is not finite; the parameters
    are those of the last good step then.
    """
    device = next(model.parameters()).device
    parts = [part.to(device) for part in batch.split(settings.micro_batch_size)]
    targets = int((batch.targets >= 0).sum())
    model.train()
    optimizer.zero_grad(set_to_none=True)
    # Re-seeded at each step: a plugin that draws from torch's global stream resumes exactly too.
    torch.manual_seed(derive_seed(settings.seed, "step", step))

    batch_counts = _batch_counts(model, balance_losses, parts, step, settings)
    totals: dict[str, Tensor] = {}
    counts: dict[int, Tensor] = {}
    statistics = RouterStatistics()
    shares = [part.token_count / batch.token_count for part in batch.split(settings.micro_batch_size)]
    for index, (part, share) in enumerate(zip(parts, shares, strict=True)):
        place = _Place(step, index, share, targets)
        loss, terms, records = _forward(model, balance_losses, part, batch_counts, place, settings)
        loss.backward()
        _add_counts(counts, records)
        if observe:
            statistics.add(records)
        for name, value in terms.items():
            totals[name] = totals.get(name, torch.zeros((), device=device)) + value

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or float("inf"))
    if not bool(torch.isfinite(totals["loss"] + norm)):
        raise RunFailure(describe_failure(model, parts, step, settings.precision))
    optimizer.step()
    _after_step(model, counts)
    return StepResult(totals, norm, statistics)


def _forward(
    model: Transformer,
    balance_losses: Sequence[NamedLoss],
    part: Batch,
    batch_counts: dict[int, Tensor] | None,
    place: _Place,
    settings: StepSettings,
) -> tuple[Tensor, dict[str, Tensor], list[LayerRecord]]:
    """The micro-batch's contribution to the batch's loss, and its parts."""
    with settings.precision.autocast():
        output = model(
            part.input_ids,
            part.attention_mask,
            targets=part.targets,
            tokens=_token_context(part, place.step, place.index, settings.seed),
        )
    assert output.token_loss is not None
    lm_loss = output.token_loss.sum() / place.targets
    context = BalanceContext(batch_counts or {record.layer_id: record.counts for record in output.records})
    loss, terms = lm_loss, {"lm_loss": lm_loss.detach()}
    for named in balance_losses:
        value = named.loss(output.records, context) * place.share
        loss = loss + named.loss.weight * value
        terms[named.name] = value.detach()
    return loss, terms | {"loss": loss.detach()}, output.records


@torch.no_grad()
def _batch_counts(
    model: Transformer, balance_losses: Sequence[NamedLoss], parts: list[Batch], step: int, settings: StepSettings
) -> dict[int, Tensor] | None:
    """The load of each layer over all micro-batches, when a loss needs it before the first backward pass.

    Costs one forward pass without the head; with a single micro-batch its own counts serve.
    """
    if len(parts) == 1 or not any(named.loss.needs_batch_counts for named in balance_losses):
        return None
    totals: dict[int, Tensor] = {}
    for index, part in enumerate(parts):
        with settings.precision.autocast():
            _, records = model.hidden_states(
                part.input_ids, part.attention_mask, tokens=_token_context(part, step, index, settings.seed)
            )
        _add_counts(totals, records)
    return totals


def _add_counts(totals: dict[int, Tensor], records: Sequence[LayerRecord]) -> None:
    for record in records:
        totals[record.layer_id] = totals.get(record.layer_id, torch.zeros_like(record.counts)) + record.counts


def _token_context(part: Batch, step: int, index: int, seed: int) -> TokenContext:
    noise = generator(seed, "routing noise", step, index, device=part.input_ids.device)
    return TokenContext(part.document_id, part.domain_id, noise)


def _after_step(model: Transformer, counts: dict[int, Tensor]) -> None:
    for layer_id, layer in enumerate(model.layers):
        after_step = getattr(layer.mlp.router, "after_step", None) if isinstance(layer.mlp, MoEBlock) else None
        if after_step is not None:
            after_step(counts[layer_id])
