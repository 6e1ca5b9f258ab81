"""A trace's text through a model twice: along the model's own routes, and along the trace's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import moelab
from moelab.config.run import TrainConfig
from moelab.data.batches import Batch
from moelab.nn.transformer import TokenContext, Transformer
from moelab.routes.files import read_trace
from moelab.routes.record import weights_fingerprint
from moelab.routes.replay import Replay, check_replayable, trace_batches
from moelab.routes.trace import Trace
from moelab.training.precision import Precision, choose_precision
from moelab_tools.routes.intervals import Estimate, estimates
from moelab_tools.waiting import Waiting

ROWS = 512  # positions whose logits are held at once


@dataclass(frozen=True)
class Replayed:
    """What forcing the routes changed."""

    tokens: int
    equal: int  # positions whose logits are equal to the bit
    largest: float  # difference of two logits
    own_loss: float  # nats a token
    change: Estimate  # of the loss, nats a token
    same_weights: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens, "positions_of_equal_bits": self.equal, "largest_logit_difference": self.largest,
            "loss_own_routes": self.own_loss, "loss_change": self.change.to_json(), "same_weights": self.same_weights,
        }  # fmt: skip

    def text(self, checkpoint: Path, trace: Path) -> str:
        weights = "the weights it was recorded with" if self.same_weights else "other weights than it was recorded with"
        lines = [
            f"{trace} on {checkpoint}: {weights}",
            f"logits: equal to the bit at {self.equal:,} of {self.tokens:,} positions, largest difference "
            f"{self.largest:.3g}",
            f"loss: {self.own_loss:.4f} nats a token along its own routes, forced {self.change.told()} over "
            f"{self.change.documents} documents",
        ]
        if self.same_weights and self.equal < self.tokens:
            lines.append(
                "not all bits are equal: precision, batch size, threads, device or kernels differ from the recording's"
            )
        return "\n".join(lines)


def replay(
    checkpoint: Path, folder: Path, *, dtype: str | None, batch_size: int | None, device: str, trust: bool
) -> Replayed:
    """Raises DataError for a trace that is damaged or of another layout than the checkpoint's model."""
    trace = read_trace(folder)
    recorded = trace.facts["precision"].get("dtype")
    chosen = dtype or (recorded if recorded in ("float32", "bfloat16") else "float32")
    precision = choose_precision(TrainConfig(steps=1, device=device, dtype=chosen))
    model = moelab.load(checkpoint, device=precision.device, trust=trust)
    check_replayable(trace, model, str(folder))
    return compare_forced(model, trace, precision, batch_size)


def compare_forced(model: Transformer, trace: Trace, precision: Precision, batch_size: int | None = None) -> Replayed:
    """The trace's text along both routes, in batches of `batch_size` windows (None: as it was recorded)."""
    size = batch_size or trace.batch_size
    with Waiting("replaying, batches", -(-trace.windows // size)) as waiting:
        nats = np.zeros((2, len(trace.documents)))
        equal, largest = 0, 0.0
        for first, batch in trace_batches(trace, size):
            assert batch.target_document_id is not None
            document, targets = batch.target_document_id.reshape(-1).numpy(), batch.targets.reshape(-1)
            own = _hidden(model, batch, precision, None)
            forced = _hidden(model, batch, precision, Replay(trace, first, len(batch.input_ids)))
            for begin in range(0, len(own), ROWS):
                rows = slice(begin, begin + ROWS)
                logits = [_logits(model, hidden[rows], precision) for hidden in (own, forced)]
                equal += int((logits[0] == logits[1]).all(-1).sum())
                largest = max(largest, float((logits[0] - logits[1]).abs().max()))
                for row, mine in enumerate(logits):
                    loss = torch.nn.functional.cross_entropy(mine, targets[rows], reduction="none")
                    np.add.at(nats[row], document[rows], loss.double().numpy())
            waiting.step()
    tokens = np.bincount(trace.target_document_id.ravel(), minlength=len(trace.documents)).astype(np.float64)
    return Replayed(
        trace.tokens, equal, largest, float(nats[0].sum() / tokens.sum()),
        estimates((nats[1] - nats[0])[None], tokens)[0],
        weights_fingerprint(model) == trace.facts["weights"],
    )  # fmt: skip


@torch.no_grad()
def _hidden(model: Transformer, batch: Batch, precision: Precision, override: Replay | None) -> Tensor:
    """[T, D] after the last layer's norm."""
    part = batch.to(precision.device)
    context = TokenContext(part.document_id, part.domain_id, routing_override=override, attention_id=part.attention_id)
    with precision.autocast():
        return model.hidden_states(part.input_ids, part.attention_mask, tokens=context)[0].flatten(0, 1)


@torch.no_grad()
def _logits(model: Transformer, hidden: Tensor, precision: Precision) -> Tensor:
    """hidden [r, D] -> [r, V] float32 on the host."""
    with precision.autocast():
        logits: Tensor = model.lm_head(hidden)
    return logits.float().cpu()
