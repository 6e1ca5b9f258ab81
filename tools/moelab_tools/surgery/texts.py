"""The text of a run: some that its experts are scored on, and held-out text that the surgery is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moelab.config.run import RunConfig
from moelab.data.batches import ValidationBatches
from moelab.data.corpus import Corpus
from moelab.registry import Registry
from moelab.training.evaluate import evaluation_batch_size
from moelab.training.setup import build_corpus_of, resolve_run
from moelab_tools.checkpoints import tokenizer_of

TRAIN, HELD_OUT = "train", "held-out"


@dataclass(frozen=True)
class Probe:
    """Windows of held-out text, and the document of each target: all [B, S] int64."""

    ids: Tensor
    targets: Tensor
    document: Tensor


@dataclass(frozen=True)
class Texts:
    """The corpus of a checkpoint's run, under its own config or with some keys laid over it."""

    run: RunConfig
    registry: Registry
    corpus: Corpus

    def batches(self, split: str, tokens: int) -> ValidationBatches:
        """About so many tokens, in windows spread evenly over the text and its domains."""
        stream = self.corpus.train if split == TRAIN else self.corpus.validation
        length = self.run.train.sequence_length
        return ValidationBatches(stream, -(-tokens // length), length, evaluation_batch_size(self.run))

    def probe(self, tokens: int) -> Probe:
        """Held-out text. Targets that are padding are -100."""
        found = list(self.batches(HELD_OUT, tokens))
        documents = [batch.target_document_id for batch in found if batch.target_document_id is not None]
        return Probe(
            torch.cat([batch.input_ids for batch in found]), torch.cat([batch.targets for batch in found]),
            torch.cat(documents),
        )  # fmt: skip


def texts_of(folder: Path, run: RunConfig, registry: Registry) -> Texts:
    """Of a checkpoint with the config that `evaluation_config` gave. DataError where the data are gone."""
    resolve_run(run, registry)
    tokenizer = tokenizer_of(folder, run.data.tokenizer)
    return Texts(run, registry, build_corpus_of(run, registry, tokenizer))
