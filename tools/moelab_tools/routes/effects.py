"""What counterfactuals cost: changes of the held-out loss, by document, domain and class of token.

X counterfactuals, m documents, C classes of tokens (data/token_classes.py, of the token that is predicted).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moelab.data.batches import Batch
from moelab.data.token_classes import CLASSES, class_of_ids
from moelab.data.tokenizer import Tokenizer
from moelab.nn.transformer import Transformer
from moelab.routes.counterfactuals import Counterfactual, TokenLosses, losses
from moelab.training.precision import Precision
from moelab_tools.routes.intervals import Estimate, estimates
from moelab_tools.waiting import Waiting


@dataclass(frozen=True)
class Text:
    """Held-out batches that can be read more than once."""

    batches: Sequence[Batch]
    documents: list[tuple[str, str]]  # (name, domain), of every document id

    @classmethod
    def of(cls, batches: Iterable[Batch], documents: list[tuple[str, str]]) -> Text:
        return cls(list(batches), documents)

    @cached_property
    def scored(self) -> np.ndarray:
        """[m]: the documents of which a token is predicted."""
        return np.unique(np.concatenate([_targets(batch) for batch in self.batches]))

    @property
    def tokens(self) -> int:
        return sum(batch.targets.numel() for batch in self.batches)


@dataclass(frozen=True)
class Tally:
    """Nats summed over tokens by document and class: what each counterfactual added to the model's own."""

    documents: list[tuple[str, str]]  # m
    tokens: np.ndarray  # [m, C]
    own: np.ndarray  # [m, C]
    added: np.ndarray  # [X, m, C]
    loads: dict[int, np.ndarray]  # layer -> [E] assignments of the untouched model

    @property
    def domains(self) -> list[str]:
        return sorted({domain for _, domain in self.documents})

    @property
    def classes(self) -> list[int]:
        """Those that occur."""
        return np.flatnonzero(self.tokens.sum(0)).tolist()

    @property
    def loss(self) -> float:
        """The model's own, nats a token."""
        return float(self.own.sum() / self.tokens.sum())

    def effects(self, added: np.ndarray | None = None) -> list[Estimate]:
        """Nats a token, of every counterfactual or of other sums `added` [X, m, C]."""
        return estimates((self.added if added is None else added).sum(-1), self.tokens.sum(-1))

    def by_domain(self, domain: str) -> list[Estimate]:
        mine = np.array([own == domain for _, own in self.documents])
        return estimates(self.added[:, mine].sum(-1), self.tokens[mine].sum(-1))

    def by_class(self, kind: int) -> list[Estimate]:
        return estimates(self.added[:, :, kind], self.tokens[:, kind])


def tally(
    model: Transformer,
    text: Text,
    tokenizer: Tokenizer,
    precision: Precision,
    counterfactuals: Sequence[Counterfactual],
    label: str = "removing and looking",
) -> Tally:
    """Every counterfactual on all of the text."""
    kinds, count = class_of_ids(tokenizer, model.config.vocab_size), len(CLASSES)
    shape = (len(text.scored), count)
    tokens, own = np.zeros(shape), np.zeros(shape)
    added = np.zeros((len(counterfactuals), *shape))
    loads: dict[int, np.ndarray] = {}
    with Waiting(label, len(text.batches) * max(1, len(counterfactuals))) as waiting:
        place, mine = np.zeros(0, np.int64), np.zeros(0)
        for told in losses(model, text.batches, precision, counterfactuals):
            if told.index < 0:
                place = np.searchsorted(text.scored, _targets(told.batch)) * count
                place += kinds[told.batch.targets.reshape(-1).numpy()]
                mine = _nats(told)
                tokens.reshape(-1)[:] += np.bincount(place, minlength=tokens.size)
                own.reshape(-1)[:] += np.bincount(place, mine, tokens.size)
                for record in told.records:
                    loads[record.layer_id] = loads.get(record.layer_id, 0) + record.counts.cpu().numpy()
            else:
                if told.loss is not None:
                    added[told.index].reshape(-1)[:] += np.bincount(place, _nats(told) - mine, tokens.size)
                waiting.step()
    documents = [text.documents[i] for i in text.scored.tolist()]
    return Tally(documents, tokens, own, added, loads)


def _nats(told: TokenLosses) -> np.ndarray:
    assert told.loss is not None
    return told.loss.reshape(-1).double().numpy()


def _targets(batch: Batch) -> np.ndarray:
    """[T]: the document of each target."""
    assert batch.target_document_id is not None, "held-out batches know their targets' documents"
    return batch.target_document_id.reshape(-1).numpy()
