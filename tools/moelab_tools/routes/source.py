"""A checkpoint and the text that its routes are looked at on, as `trace` and `ablate` take them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click

import moelab
from moelab.builder import build_model
from moelab.config.run import RunConfig, TrainConfig
from moelab.data.batches import ValidationBatches
from moelab.data.corpus import Document, TokenStream, stream_of
from moelab.data.seen import history_of, seen_text
from moelab.data.tokenizer import Tokenizer
from moelab.errors import ConfigError, DataError
from moelab.nn.transformer import Transformer
from moelab.origin import check_vocabulary, read_origin
from moelab.paths import user_path
from moelab.registry import Registry
from moelab.routes.record import weights_fingerprint
from moelab.safe_files import Reading, read_text
from moelab.training.evaluate import evaluation_batch_size
from moelab.training.precision import Precision, choose_precision, set_threads
from moelab.training.setup import build_corpus_of, resolve_run
from moelab_tools.checkpoints import evaluation_config, tokenizer_of

HELD_OUT, TRAIN = "held-out", "train"
READING = Reading(DataError, "give a file of UTF-8 text")


@dataclass(frozen=True)
class Source:
    """A model on a device with the batches that it reads."""

    run: RunConfig
    model: Transformer
    tokenizer: Tokenizer
    stream: TokenStream
    domains: list[str]
    batches: ValidationBatches
    precision: Precision
    facts: dict[str, Any]  # for the head of a trace
    training: ValidationBatches | None = None  # as many windows of the text that it was trained on, where that is known

    @property
    def documents(self) -> list[tuple[str, str]]:
        """(name, domain) of every document of the stream."""
        domain = self.stream.document_domain.tolist()
        return [(name, self.domains[d]) for name, d in zip(self.stream.document_names, domain, strict=True)]


@dataclass(frozen=True)
class Subject:
    """A checkpoint of which neither weights nor text are read yet: enough to tell what can't be asked of it."""

    checkpoint: Path
    run: RunConfig
    registry: Registry
    tokenizer: Tokenizer
    precision: Precision
    threads: int
    files: list[str]  # of text; none: its own
    train: bool  # of its own text, what it was trained on
    untrained: bool

    @cached_property
    def shape(self) -> Transformer:
        """The model on the meta device."""
        return build_model(self.run.model, self.registry, device="meta", seed=None)

    def read(self, tokens: int | None) -> Source:
        """Its model, or one of random weights, and `tokens` of the text (None: evaluation.sequences windows)."""
        run = self.run
        text = _files(self.files, self.tokenizer) if self.files else _own_text(self)
        stream = text.stream
        length = min(run.train.sequence_length, max(1, len(stream) - 1)) if self.files else run.train.sequence_length
        if length < run.train.sequence_length:
            click.echo(f"windows of {length} tokens, for the text has no more", err=True)
        sequences = run.evaluation.sequences if tokens is None else -(-tokens // length)
        batches = ValidationBatches(stream, sequences, length, evaluation_batch_size(run))
        counted = {"windows": len(batches.windows), "windows_of_the_text": (len(stream) - 1) // length}
        model = self.model()
        facts = {
            "moelab": moelab.__version__,
            "source": self.checkpoint.resolve().name + (", untrained" if self.untrained else ""),
            "weights": weights_fingerprint(model),
            "tokenizer": self.tokenizer.fingerprint,
            "vocab_size": run.model.vocab_size,
            "batch_size": batches.batch_size,
            "precision": {
                "device": self.precision.device.type,
                "dtype": str(self.precision.dtype).removeprefix("torch."),
                "threads": self.threads,
            },
            "data": text.facts | counted,
        }
        read = None if text.read is None else ValidationBatches(text.read, sequences, length, batches.batch_size)
        return Source(run, model, self.tokenizer, stream, text.domains, batches, self.precision, facts, read)

    def model(self) -> Transformer:
        """Its weights, for who has a text of his own; else `read`."""
        device = self.precision.device
        if self.untrained:
            return build_model(self.run.model, self.registry, device=device, seed=self.run.seed).eval()
        return moelab.load(self.checkpoint, device=device, registry=self.registry)


def subject_of(
    checkpoint: Path, config: tuple[str, ...], data: tuple[str, ...], *, trust: bool = False, untrained: bool = False
) -> Subject:
    """What is to be read. `data`: held-out or train, of the checkpoint's own data or those of the config, or files."""
    files = [path for path in data if path not in (HELD_OUT, TRAIN)]
    if files and len(files) < len(data):
        raise ConfigError(f"--data: either {HELD_OUT}, or {TRAIN}, or files, not both")
    if files and not config:
        config = _enough(checkpoint)
    run, registry = evaluation_config(checkpoint, config, trust=trust)
    threads = set_threads(run.train)
    precision = choose_precision(run.train)
    resolve_run(run, registry)
    tokenizer = tokenizer_of(checkpoint, run.data.tokenizer)
    check_vocabulary(run.model.vocab_size, tokenizer, run.data.tokenizer)
    return Subject(checkpoint, run, registry, tokenizer, precision, threads, files, TRAIN in data, untrained)


def _enough(checkpoint: Path) -> tuple[str, ...]:
    """What must be said beside files of text: nothing of a run; of a Hugging Face folder what a run must have."""
    origin = read_origin(checkpoint)
    length = min(TrainConfig.sequence_length, origin.model.max_position_embeddings)
    return () if origin.is_run else ("train.steps=1", f"train.sequence_length={length}")


@dataclass(frozen=True)
class _Text:
    stream: TokenStream
    domains: list[str]
    facts: dict[str, Any]
    read: TokenStream | None = None  # what was trained on, where that is another text


def _own_text(subject: Subject) -> _Text:
    run, tokenizer = subject.run, subject.tokenizer
    corpus = build_corpus_of(run, subject.registry, tokenizer)
    facts = {"split": TRAIN if subject.train else HELD_OUT, "fingerprint": corpus.fingerprint}
    if subject.train:
        return _Text(corpus.train, corpus.domains, facts)
    batches = ValidationBatches(corpus.validation, run.evaluation.sequences, run.train.sequence_length, 1)
    name = str(subject.checkpoint)
    history = history_of([read_origin(subject.checkpoint).folder], [name])
    for line in seen_text(history, name, corpus, tokenizer, batches.documents_scored()).lines():
        click.echo(f"warning: {line}", err=True)
    return _Text(corpus.validation, corpus.domains, facts, corpus.train)


def _files(paths: list[str], tokenizer: Tokenizer) -> _Text:
    documents = []
    for given in paths:
        path = user_path(given, "--data")
        documents.append(Document(read_text(path, READING), "text", path.name))
    return _Text(*stream_of(documents, tokenizer), {"split": "files"})
