"""A rehearsal of the first step on a few tokens, before anything is written: plugins that don't fit fail here."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moelab.alarms import Alarm
from moelab.data.batches import Batch
from moelab.moe.balance import NamedLoss
from moelab.moe.batch_statistics import BatchStatistics, call_after_step
from moelab.moe.block import MoEBlock
from moelab.moe.routing import LayerRecord
from moelab.nn.count import moe_blocks
from moelab.nn.pieces import let_go
from moelab.nn.transformer import Transformer
from moelab.plugin_faults import ANYTHING, PluginPart, plugins_told
from moelab.training.causality import Causality, probe_causality
from moelab.training.failure import Terms
from moelab.training.objective import Place
from moelab.training.router_gradient import warn_of_untaught_routers, watch_routers
from moelab.training.step import StepSettings, batch_terms

logger = logging.getLogger("moelab")
PROBE_TOKENS = 16


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal found that is no fault."""

    alarms: list[Alarm]  # of routers that the text can't teach
    causality: Causality  # which layers look at later tokens


def probe_step(
    model: Transformer, balance_losses: Sequence[NamedLoss], batch: Batch, settings: StepSettings
) -> Rehearsal:
    """One short sequence through every part, in training and in evaluation; leaves no trace.

    Raises ConfigError naming the layer or loss, the plugin, its owner, file and line, for what a part returns or
    raises, and for one that looks at later tokens without saying so. Warns of routers that the text can't teach.
    """
    device = next(model.parameters()).device
    part = batch.split(1)[0].narrow(PROBE_TOKENS).to(device)
    blocks = list(moe_blocks(model))
    with no_trace(model), plugins_told():
        model.train()
        with watch_routers(blocks) as calls, torch.enable_grad():
            terms, records = batch_terms(model, balance_losses, part, None, Place(0, 0, 1.0, PROBE_TOKENS), settings)
        _check_gradients(balance_losses, terms, records)
        _rehearse_after_step(blocks, balance_losses, records)
        with settings.precision.autocast(), torch.no_grad():
            model.eval()(part.input_ids, part.attention_mask, targets=part.targets)
            model.train()
            alarms = warn_of_untaught_routers(model.config, blocks, calls)
            inputs = [(block, x.detach(), info) for block in blocks for x, info in [calls[block.layer_id]]]
            allowed = model.config.moe is not None and model.config.moe.allow_noncausal
            return Rehearsal(alarms, probe_causality(inputs, model.config.vocab_size, allowed=allowed))


def _check_gradients(balance_losses: Sequence[NamedLoss], terms: Terms, records: Sequence[LayerRecord]) -> None:
    """A loss whose value has no gradient teaches nothing, silently."""
    for named in balance_losses:
        mine = [record for record in records if named.layers is None or record.layer_id in named.layers]
        if not terms[named.name][0].requires_grad and any(map(_teachable, mine)):
            fault = "returned a value without a gradient, so it teaches nothing; keep the graph of its records"
            raise named.part.fault(fault, named.loss)


def _teachable(record: LayerRecord) -> bool:
    """Whether a loss on this layer could reach a parameter through what the router decided."""
    return any(v is not None and v.requires_grad for v in (record.routing.scores, record.routing.logits))


def _rehearse_after_step(
    blocks: Sequence[MoEBlock], balance_losses: Sequence[NamedLoss], records: Sequence[LayerRecord]
) -> None:
    """What follows an optimizer step, on copies: an error there would come when the update is made already."""
    statistics = BatchStatistics(balance_losses)
    statistics.add(records)
    for block in blocks:
        if hasattr(block.router, "after_step"):
            counts, mean = statistics.wanted[block.layer_id], statistics.mean_statistics(block.layer_id)
            step = partial(_step_of_router, counts=counts, mean=mean)
            with block.gathered():
                _rehearse(block.parts["router"], block.router, step)
    for named in balance_losses:
        if hasattr(named.loss, "after_step"):
            _rehearse(named.part, named.loss, lambda loss: loss.after_step(statistics.context()))


def _step_of_router(router: Any, counts: torch.Tensor, mean: torch.Tensor | None) -> None:
    call_after_step(router.after_step, counts, mean, 0)


def _rehearse(part: PluginPart, built: object, call: Callable[[Any], None]) -> None:
    try:
        twin = copy.deepcopy(built)
    except Exception:  # it holds what can't be copied; then there is no rehearsal
        return
    try:
        call(twin)
    except ANYTHING as error:
        if part.ours:
            raise
        raise part.raised(error) from error


@contextmanager
def no_trace(model: Transformer) -> Iterator[None]:
    """Buffers and random numbers are as before the block; what a MoE layer was told once it need not be told again.

    Of a model in pieces, what a forward pass left gathered for a backward pass that does not come is let go.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        yield
    model.train()
    let_go(model)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
