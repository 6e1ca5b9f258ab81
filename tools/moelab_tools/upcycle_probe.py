"""The text on which an upcycled model is compared with its source: held out of a data source, or random ids."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moelab.config.upcycle import UpcycleConfig
from moelab.errors import DataError
from moelab.hookspecs import DATA_SOURCES
from moelab.paths import Places
from moelab.registry import Registry, sound_plugins
from moelab_upcycling.streams import stream

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("moelab")
LENGTH = 128  # tokens of a sequence: many short ones come from more documents


@dataclass(frozen=True)
class Probe:
    """Sequences, and the document of each target."""

    ids: Tensor  # [B, S] int64
    targets: Tensor  # [B, S] int64
    document: Tensor  # [B, S] int64, of the target
    said: str  # what it is, for the receipt
    text: bool
    registry: Registry  # of the plugins with torch: of the data source, and of the models


def probe_of(config: UpcycleConfig, folder: Path, vocab_size: int, seed: int, places: Places) -> Probe:
    """At least `config.receipt.tokens` targets of text that the tokenizer in `folder` reads, else random ids, told.

    Raises ConfigError or DataError where the data source can't be read.
    """
    import torch

    registry = _registry(config, places)
    sequences = -(-config.receipt.tokens // LENGTH)
    reason = "the source has no tokenizer.json"
    if (folder / "tokenizer.json").is_file():
        try:
            return _text(config, folder, vocab_size, sequences, registry, places)
        except DataError as error:
            reason = str(error)
    logger.warning("receipt: random token ids, on which no loss means anything: %s", reason)
    raw = stream(seed, "receipt/2", 0, "probe").random_raw(sequences * (LENGTH + 1))
    ids = torch.tensor([int(word) % vocab_size for word in raw]).view(sequences, LENGTH + 1)
    document = torch.arange(sequences)[:, None].expand(-1, LENGTH)
    return Probe(ids[:, :-1], ids[:, 1:], document, f"random token ids ({reason})", False, registry)


def _registry(config: UpcycleConfig, places: Places) -> Registry:
    """Of all installed packages that work: the conversion needed none of the others, which are told."""
    sound, faults = sound_plugins() if config.entry_points else ([], {})
    for fault in faults.values():
        logger.warning("receipt: made without an installed package: %s", fault)
    return Registry(config.plugins, sound, places)


def _text(
    config: UpcycleConfig, folder: Path, vocab_size: int, sequences: int, registry: Registry, places: Places
) -> Probe:
    from moelab.data.batches import ValidationBatches
    from moelab.data.corpus import DataContext
    from moelab.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    context = DataContext(tokenizer, places=places)
    corpus = registry.build(DATA_SOURCES, config.receipt.source, context, "receipt.source")
    batch = next(iter(ValidationBatches(corpus.validation, sequences, LENGTH, sequences)))
    highest = int(max(batch.input_ids.max(), batch.targets.max()))
    if highest >= vocab_size:
        raise DataError(f"the tokenizer gives the id {highest}, and the model has {vocab_size} rows")
    assert batch.target_document_id is not None
    found = batch.targets.numel()
    if found < config.receipt.tokens:
        logger.warning("receipt: %d held-out tokens are all that receipt.source has", found)
    said = f"held-out text of {config.receipt.source['name']}"
    return Probe(batch.input_ids, batch.targets, batch.target_document_id, said, True, registry)
