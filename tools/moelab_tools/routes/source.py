"""A checkpoint and the text that its routes are looked at on, as `trace` and `ablate` take them."""

from __future__ import annotations

from dataclasses import dataclass
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


def open_source(
    checkpoint: Path,
    config: tuple[str, ...],
    data: tuple[str, ...],
    tokens: int | None,
    *,
    trust: bool = False,
    untrained: bool = False,
) -> Source:
    """The checkpoint's model, or one of random weights, and `tokens` of the text (None: evaluation.sequences windows).

    `data`: held-out or train, of the checkpoint's own data or those of the config, or files of text.
    """
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
    text = _files(files, tokenizer) if files else _own_text(run, registry, tokenizer, checkpoint, train=TRAIN in data)
    stream = text.stream
    length = min(run.train.sequence_length, max(1, len(stream) - 1)) if files else run.train.sequence_length
    if length < run.train.sequence_length:
        click.echo(f"windows of {length} tokens, for the text has no more", err=True)
    sequences = run.evaluation.sequences if tokens is None else -(-tokens // length)
    batches = ValidationBatches(stream, sequences, length, evaluation_batch_size(run))
    counted = {"windows": len(batches.windows), "windows_of_the_text": (len(stream) - 1) // length}
    model = _model(checkpoint, run, registry, precision, untrained=untrained)
    facts = {
        "moelab": moelab.__version__,
        "source": checkpoint.resolve().name + (", untrained" if untrained else ""),
        "weights": weights_fingerprint(model),
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": run.model.vocab_size,
        "batch_size": batches.batch_size,
        "precision": {
            "device": precision.device.type,
            "dtype": str(precision.dtype).removeprefix("torch."),
            "threads": threads,
        },
        "data": text.facts | counted,
    }
    read = None if text.read is None else ValidationBatches(text.read, sequences, length, batches.batch_size)
    return Source(run, model, tokenizer, stream, text.domains, batches, precision, facts, read)


def _enough(checkpoint: Path) -> tuple[str, ...]:
    """What must be said beside files of text: nothing of a run; of a Hugging Face folder what a run must have."""
    origin = read_origin(checkpoint)
    length = min(TrainConfig.sequence_length, origin.model.max_position_embeddings)
    return () if origin.is_run else ("train.steps=1", f"train.sequence_length={length}")


def _model(
    checkpoint: Path, run: RunConfig, registry: Registry, precision: Precision, *, untrained: bool
) -> Transformer:
    if untrained:
        model = build_model(run.model, registry, device=precision.device, seed=run.seed).eval()
    else:
        model = moelab.load(checkpoint, device=precision.device, registry=registry)
    return model


@dataclass(frozen=True)
class _Text:
    stream: TokenStream
    domains: list[str]
    facts: dict[str, Any]
    read: TokenStream | None = None  # what was trained on, where that is another text


def _own_text(run: RunConfig, registry: Registry, tokenizer: Tokenizer, checkpoint: Path, *, train: bool) -> _Text:
    corpus = build_corpus_of(run, registry, tokenizer)
    facts = {"split": TRAIN if train else HELD_OUT, "fingerprint": corpus.fingerprint}
    if train:
        return _Text(corpus.train, corpus.domains, facts)
    batches = ValidationBatches(corpus.validation, run.evaluation.sequences, run.train.sequence_length, 1)
    history = history_of([read_origin(checkpoint).folder], [str(checkpoint)])
    for line in seen_text(history, str(checkpoint), corpus, tokenizer, batches.documents_scored()).lines():
        click.echo(f"warning: {line}", err=True)
    return _Text(corpus.validation, corpus.domains, facts, corpus.train)


def _files(paths: list[str], tokenizer: Tokenizer) -> _Text:
    documents = []
    for given in paths:
        path = user_path(given, "--data")
        documents.append(Document(read_text(path, READING), "text", path.name))
    return _Text(*stream_of(documents, tokenizer), {"split": "files"})
