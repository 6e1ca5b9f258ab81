"""The fixed batch of held-out text that observers are shown between steps, and its forward pass."""

from __future__ import annotations

import numpy as np
import torch

from moelab.data.batches import Batch, ValidationBatches, read_windows
from moelab.moe.probe import Probe
from moelab.nn.transformer import TokenContext, Transformer
from moelab.training.precision import Precision

MOST_TOKENS = 4096  # of the batch: enough that a share of a domain's tokens is known to a few per cent


def probe_batch(validation: ValidationBatches, most_sequences: int) -> Batch:
    """The first windows of the held-out choice, which takes the domains in turn: at most so many, and MOST_TOKENS."""
    fit = max(1, MOST_TOKENS // validation.sequence_length)
    windows = np.asarray(validation.windows[: min(most_sequences, fit)])
    return read_windows(validation.stream, windows, validation.sequence_length, apart=validation.apart)


@torch.no_grad()
def look(model: Transformer, batch: Batch, domains: list[str], precision: Precision) -> Probe:
    """Forward `batch` in evaluation mode, without the head; the model is as it was afterwards."""
    was_training = model.training
    model.eval()
    part = batch.to(precision.device)
    with precision.autocast():
        context = TokenContext(part.document_id, part.domain_id, measure=True, attention_id=part.attention_id)
        records = model(part.input_ids, part.attention_mask, tokens=context, head=False).records
    model.train(was_training)
    return Probe(records, part.input_ids.reshape(-1), part.domain_id.reshape(-1), domains)
