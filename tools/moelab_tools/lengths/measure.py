"""One checkpoint at several lengths: held-out loss by place, how routing drifts, how widely it attends, lost keys."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moelab.builder import positional_parts
from moelab.config.run import RunConfig
from moelab.data.batches import Batch, ValidationBatches
from moelab.data.corpus import Corpus
from moelab.data.tokenizer import Tokenizer
from moelab.errors import ConfigError, DataError
from moelab.moe.routing import LayerRecord
from moelab.nn.attention_entropy import attention_entropy
from moelab.nn.transformer import TokenContext, Transformer
from moelab.registry import Registry
from moelab.training.evaluate import TOKENS_AT_ONCE, evaluate
from moelab.training.evaluation import Evaluation, bin_names, bin_of
from moelab.training.precision import Precision
from moelab.training.stages import held_out
from moelab_tools.lengths.asked import Way, parse_lengths
from moelab_tools.passkey import make_trials, passkey_accuracy

logger = logging.getLogger("moelab")

ENTROPY_TOKENS = 1 << 14  # that are looked at for the entropy of attention
LEAST_SHOWN = 4  # drift is shown from the trained length over this: bins of few places have too few assignments


@dataclass(frozen=True)
class AtLength:
    """What a length gave."""

    length: int  # tokens of a sequence
    times: float  # the trained length
    loss: float  # nats a token
    tokens: int  # that were scored
    beyond: float | None  # the loss of tokens with at least the trained length before them; None: there are none
    positions: dict[str, float]  # tokens before the target -> loss
    drift: dict[str, float]  # MoE layer -> share of assignments that go elsewhere beyond the trained length
    drift_within: dict[str, float]  # the same of the trained length's second half, beside its first
    passkey: dict[str, float]  # depth -> share of keys given back; empty where not asked for
    filled: list[str]  # what the options left out
    drift_by_place: dict[str, dict[str, float]]  # MoE layer -> tokens before the target -> share, beside all within
    entropy: dict[str, dict[str, float]]  # layer -> tokens before the target -> nats of attention's entropy
    documents: dict[str, tuple[float, int]]  # nats and tokens beyond the trained length; of all where none is

    @property
    def found(self) -> float | None:
        """Of keys at all depths, which have as many each."""
        return sum(self.passkey.values()) / len(self.passkey) if self.passkey else None


@dataclass(frozen=True)
class Looked:
    """A checkpoint, the text it is looked at with, and how much of it."""

    model: Transformer
    run: RunConfig
    registry: Registry
    corpus: Corpus
    precision: Precision
    tokens: int | None = None  # at each length; None: what the run's own evaluation reads
    keys: tuple[Tokenizer, int] | None = None  # trials of each depth of passkey retrieval

    @property
    def trained(self) -> int:
        return self.run.train.sequence_length


def at_lengths(looked: Looked, way: Way, lengths: str) -> list[AtLength]:
    """Each length in turn, over about as many tokens; the model is then again what it was.

    Raises ConfigError, DataError where the text is too short.
    """
    rehearse(looked, [way], lengths)
    with _as_it_was(looked):
        return [_at_length(looked, way, length) for length in parse_lengths(lengths, looked.trained)]


def rehearse(looked: Looked, ways: Sequence[Way], lengths: str) -> list[Way]:
    """The ways that the model can take. Tells of optional ones that it can't.

    Raises UserError for what would else be found after hours: another way that can't be, too short a text.
    """
    asked, text = parse_lengths(lengths, looked.trained), looked.corpus.validation
    for length in asked:
        if length >= len(text):
            raise DataError(
                f"--length: {length} tokens and a target more, and the held-out text has {len(text)}; ask for at most "
                f"{len(text) - 1}, give more text, or raise data.validation_fraction"
            )
        if looked.keys is not None:
            make_trials(text, looked.keys[0], length, 1)
    found = []
    with _as_it_was(looked):
        for way in ways:
            try:
                for length in asked:
                    way.positions.apply(looked.model, looked.registry, length, looked.trained)
            except ConfigError as error:
                if not way.optional:
                    raise
                logger.warning("--ways: %s is left out: %s", way.name, error)
                continue
            found.append(way)
    return found


@contextmanager
def _as_it_was(looked: Looked) -> Iterator[None]:
    own = looked.model.config
    try:
        yield
    finally:
        looked.model.take_positions(own, *positional_parts(own, looked.registry))


def _at_length(looked: Looked, way: Way, length: int) -> AtLength:
    model, run, trained = looked.model, looked.run, looked.trained
    filled = way.positions.apply(model, looked.registry, length, trained)
    budget = looked.tokens or run.evaluation.sequences * trained
    batches = held_out(_reading(run, length, budget), looked.corpus)
    loads = Loads(length, trained)
    evaluation = evaluate(model, batches, looked.precision, watch=loads.add, border=trained)
    beyond = _beyond(evaluation, trained, batches.documents_scored()) if length > trained else None
    judged = (evaluation.nats, evaluation.tokens) if beyond is None else beyond
    passkey = {}
    if looked.keys is not None:
        trials = make_trials(looked.corpus.validation, looked.keys[0], length, looked.keys[1])
        passkey = passkey_accuracy(model, looked.keys[0], trials)
    return AtLength(
        length=length,
        times=length / trained,
        loss=evaluation.loss(),
        tokens=int(evaluation.tokens.sum()),
        beyond=None if beyond is None else float(beyond[0].sum() / beyond[1].sum()),
        positions={name: sums.loss() for name, sums in evaluation.places["position"].items()},
        drift=loads.beyond(),
        drift_within=loads.within(),
        passkey=passkey,
        filled=filled,
        drift_by_place=loads.by_place(),
        entropy=entropy_by_place(model, batches, looked.precision, trained),
        documents={
            batches.stream.document_names[index]: (float(judged[0][index]), int(judged[1][index]))
            for index in np.flatnonzero(judged[1]).tolist()
        },
    )


def _reading(run: RunConfig, length: int, budget: int) -> RunConfig:
    """The run's config, but that about `budget` tokens are read in sequences of `length`."""
    evaluation = replace(
        run.evaluation, sequences=max(1, budget // length), batch_size=max(1, TOKENS_AT_ONCE // length)
    )
    return replace(run, train=replace(run.train, sequence_length=length), evaluation=evaluation)


def _beyond(evaluation: Evaluation, trained: int, scored: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(nats, tokens) [n] of the bins that begin at the trained length or later; None: there are none.

    scored [n] bool: the documents of which places have a row.
    """
    far = [sums for name, sums in evaluation.places["position"].items() if int(name.split("-")[0]) >= trained]
    if not far:
        return None
    found = np.zeros((2, len(scored)))
    found[:, scored] = np.sum([(sums.nats, sums.tokens) for sums in far], axis=0)
    return found[0], found[1]


class Loads:
    """Assignments of each MoE layer to each expert, by the place of the token in its sequence."""

    def __init__(self, length: int, trained: int) -> None:
        self.length, self.trained = length, trained
        bins = bin_of(np.arange(1, length + 1), trained)  # by tokens before the target, as losses are
        borders = (np.arange(length) >= trained // 2).astype(np.int64) + (np.arange(length) >= trained)
        together = np.stack([bins, borders], 1)  # a group lies in one bin, and in one part of the trained length
        kinds, groups = np.unique(together, axis=0, return_inverse=True)
        self.bin, self.border = torch.from_numpy(kinds[:, 0]), torch.from_numpy(kinds[:, 1])
        self.group = torch.from_numpy(groups.reshape(-1))  # [S]
        self.counts: dict[str, Tensor] = {}  # layer -> [groups, E] int64

    def add(self, batch: Batch, records: Sequence[LayerRecord]) -> None:
        """Of one forward pass."""
        group = self.group.repeat(len(batch.input_ids))
        for record in records:
            routing = record.routing.compact()
            counts = torch.zeros(len(self.bin), routing.num_experts, dtype=torch.int64)
            where = (group[routing.token.cpu()], routing.expert.cpu())
            counts.index_put_(where, torch.ones(len(where[0]), dtype=torch.int64), accumulate=True)
            key = str(record.layer_id)
            self.counts[key] = self.counts[key] + counts if key in self.counts else counts

    def within(self) -> dict[str, float]:
        """What moves within the trained length, from its first half to its second."""
        return {
            key: moved(*(self._of(one, self.border == part) for part in (0, 1))) for key, one in self.counts.items()
        }

    def beyond(self) -> dict[str, float]:
        """What moves beyond it; empty where nothing lies there."""
        if self.length <= self.trained:
            return {}
        return {
            key: moved(self._of(one, self.border < 2), self._of(one, self.border == 2))
            for key, one in self.counts.items()
        }

    def by_place(self) -> dict[str, dict[str, float]]:
        """{layer: {tokens before the target: what moves from all of the trained length}}; no bin of one place."""
        names = bin_names(self.length, self.trained)
        begins = {int(b): int(names[int(b)].split("-")[0]) for b in self.bin.unique()}
        shown = [b for b, begin in begins.items() if LEAST_SHOWN * begin >= self.trained and begin < self.length]
        return {
            key: {names[b]: moved(self._of(one, self.border < 2), self._of(one, self.bin == b)) for b in shown}
            for key, one in self.counts.items()
        }

    def _of(self, counts: Tensor, chosen: Tensor) -> Tensor:
        """[groups, E], [groups] bool -> [E]."""
        return counts[chosen].sum(0)


def moved(before: Tensor, after: Tensor) -> float:
    """Counts [E] twice -> half the sum of differences of their shares: 0 for the same load, 1 for none in common."""
    shares = [counts.double() / counts.sum().clamp(min=1) for counts in (before, after)]
    return float((shares[0] - shares[1]).abs().sum() / 2)


def entropy_by_place(
    model: Transformer, batches: ValidationBatches, precision: Precision, border: int
) -> dict[str, dict[str, float]]:
    """{layer: {tokens before the target: mean entropy of attention's weights, nats}} over the first ENTROPY_TOKENS.

    `border`: as `evaluate`'s.

    Layers whose attention shows no weights are left out.
    """
    rows = max(1, ENTROPY_TOKENS // batches.sequence_length)
    part = next(iter(batches)).split(rows)[0].to(precision.device)
    context = TokenContext(part.document_id, part.domain_id, attention_id=part.attention_id)
    with precision.autocast():
        found = attention_entropy(model, part.input_ids, part.attention_mask, context)
    names = bin_names(batches.sequence_length, border)
    bins = bin_of(np.arange(1, batches.sequence_length + 1), border)
    return {
        str(layer): {names[b]: float(values[torch.from_numpy(bins == b)].mean()) for b in np.unique(bins).tolist()}
        for layer, values in found.items()
    }
