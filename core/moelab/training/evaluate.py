"""Held-out loss, summed over tokens and kept by document, so that runs can be paired over documents; and samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor

from moelab.config.run import EvaluationConfig, RunConfig
from moelab.data.batches import Batch, ValidationBatches
from moelab.data.tokenizer import Tokenizer
from moelab.moe.routing import LayerRecord
from moelab.nn.generate import generate_batch
from moelab.nn.sampling import Sampling
from moelab.nn.texts import Speech
from moelab.nn.transformer import TokenContext, Transformer
from moelab.parallel.ranks import ALONE, Ranks
from moelab.training.evaluation import Evaluation, Floats, Sums, bin_names, bin_of, tokens_before
from moelab.training.precision import Precision

# Tokens of a forward pass without gradients: on a CPU a smaller one is slower and a larger one no faster
# (benchmarks/results/evaluation.md); it keeps one layer's activations at a time and no logits.
TOKENS_AT_ONCE = 1 << 14
Watch = Callable[[Batch, Sequence[LayerRecord]], None]  # of a batch, and the records of its MoE layers
AXES = ("position", "context")  # of `Evaluation.places`


def evaluation_batch_size(config: RunConfig) -> int:
    """Sequences in a forward pass: what the config says, else as many as are not slower, and at least a micro-batch.

    Under `train.memory_budget` a micro-batch, which fits without gradients where it fits with them.
    """
    train = config.train
    at_least = train.micro_batch_size or train.batch_size
    if train.memory_budget is not None:
        return config.evaluation.batch_size or at_least
    return config.evaluation.batch_size or max(at_least, ceil(TOKENS_AT_ONCE / train.sequence_length))


@torch.no_grad()
def evaluate(
    model: Transformer,
    batches: ValidationBatches,
    precision: Precision,
    ranks: Ranks = ALONE,
    *,
    watch: Watch | None = None,
    border: int = 1,
) -> Evaluation:
    """The loss of every held-out token, each counted once, by one of the ranks. `watch` sees what was routed for it.

    At `border` tokens before a target a bin of places ends, beside the powers of two.

    The batch size changes no number beyond the rounding of a matrix product of another shape (1e-7 of a document's
    loss in float32): in evaluation no router lets sequences of a batch touch each other, unless it is given an
    `eval_capacity_factor`.
    """
    was_training = model.training
    model.eval()
    found = _Found.of(batches, border)
    waiting: tuple[Batch, Tensor] | None = None
    for batch, counts in _share(batches, ranks):
        part = batch.to(precision.device)
        with precision.autocast():
            context = TokenContext(part.document_id, part.domain_id, attention_id=part.attention_id)
            output = model(part.input_ids, part.attention_mask, targets=part.targets, tokens=context)
        assert output.token_loss is not None
        if waiting is not None:  # a device computes this batch while the host sums the one before
            found.add(*waiting)
        if watch is not None and counts:
            watch(batch, output.records)
        waiting = (batch, output.token_loss) if counts else None
    if waiting is not None:
        found.add(*waiting)
    model.train(was_training)
    found.reduce(ranks)
    return found.evaluation(batches)


def _share(batches: ValidationBatches, ranks: Ranks) -> Iterator[tuple[Batch, bool]]:
    """(this rank's batches in turn, whether they count): where others have one more, one of them comes once more."""
    total, first = len(batches), None
    for index, batch in enumerate(batches):
        first = first or batch
        if index % ranks.size == ranks.rank:
            yield batch, True
    if total % ranks.size and ranks.rank >= total % ranks.size and first is not None:
        yield first, False  # the others still compute, and wait in every layer


@dataclass(frozen=True)
class _Found:
    """Sums that grow batch by batch, on the host."""

    row: np.ndarray  # [all documents] int64: place among the scored ones
    total: Tensor  # [3, n] float64: nats, tokens, bytes
    placed: dict[str, Tensor]  # axis -> [3, n * P]
    bins: list[str]  # P
    border: int

    @classmethod
    def of(cls, batches: ValidationBatches, border: int) -> _Found:
        scored = batches.documents_scored()
        bins, count = bin_names(batches.sequence_length, border), int(scored.sum())
        placed = {axis: torch.zeros(3, count * len(bins), dtype=torch.float64) for axis in AXES}
        return cls(np.cumsum(scored) - 1, torch.zeros(3, count, dtype=torch.float64), placed, bins, border)

    def add(self, batch: Batch, token_loss: Tensor) -> None:
        """token_loss [B, S], on whatever device."""
        assert batch.target_document_id is not None
        scored = batch.targets >= 0
        sizes = torch.zeros_like(scored, dtype=torch.float64) if batch.target_bytes is None else batch.target_bytes
        values = torch.stack([token_loss.cpu().double(), scored.double(), sizes]).flatten(1)  # [3, B S]
        target = batch.target_document_id.numpy()
        row = self.row[target]  # [B, S]
        self.total.index_add_(1, torch.from_numpy(row.reshape(-1)), values)
        document = np.concatenate([batch.document_id.numpy()[:, :1], target], 1)  # [B, S + 1]
        for axis, before in zip(AXES, tokens_before(document), strict=True):
            key = row * len(self.bins) + bin_of(before, self.border)
            self.placed[axis].index_add_(1, torch.from_numpy(key.reshape(-1)), values)

    def reduce(self, ranks: Ranks) -> None:
        """Add what the other ranks found."""
        for sums in (self.total, *self.placed.values()):
            sums.copy_(ranks.sum(sums))

    def evaluation(self, batches: ValidationBatches) -> Evaluation:
        """With a row for every document of the stream, zeros for those that were not read."""
        stream = batches.stream
        known = stream.token_bytes is not None or stream.id_bytes is not None
        scored = np.zeros((3, len(self.row)))
        scored[:, batches.documents_scored()] = self.total.numpy()
        places = {axis: self._bins(found.numpy(), known) for axis, found in self.placed.items()}
        return Evaluation(scored[0], scored[1], scored[2] if known else None, stream.exact_bytes, places)

    def _bins(self, found: Floats, known: bool) -> dict[str, Sums]:
        """found [3, n * P] -> the bins that were met."""
        sums = found.reshape(3, -1, len(self.bins))
        return {
            name: Sums(sums[0, :, index], sums[1, :, index], sums[2, :, index] if known else None)
            for index, name in enumerate(self.bins)
            if sums[1, :, index].any()
        }


def sample_texts(model: Transformer, tokenizer: Tokenizer, config: EvaluationConfig, seed: int) -> list[str]:
    """Each prompt with its continuation; the same seed draws the same numbers for every model."""
    if config.sample_tokens == 0:
        return []
    speech = Speech(tokenizer, (tokenizer.eos_token_id,))
    sampling = Sampling(
        config.sample_tokens, config.temperature, seed=seed, end_token_ids=speech.end_token_ids, autotune=False
    )
    ids = [speech.encode(prompt) for prompt in config.prompts]
    found = generate_batch(model, ids, sampling)
    return [prompt + tokenizer.decode(one.ids) for prompt, one in zip(config.prompts, found, strict=True)]
