"""The batches of a run: of the whole training text as it is, or with a mixer's shares, told where text repeats."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moelab.config.run import RunConfig
from moelab.data.batches import TrainBatches
from moelab.data.corpus import Corpus
from moelab.data.mixed_batches import DomainText, MixedBatches
from moelab.data.mixing import MixContext, Mixer
from moelab.data.packing import PACKINGS
from moelab.errors import ConfigError, DataError
from moelab.hookspecs import MIXERS
from moelab.plugin_faults import article
from moelab.registry import Registry

Batches = TrainBatches | MixedBatches
KEY = "data.mixer"
logger = logging.getLogger("moelab")


def build_batches(
    config: RunConfig, corpus: Corpus, registry: Registry, span: tuple[int, int] | None = None
) -> Batches:
    """Raises UserError for a mixer that asks for what is not there. Tells which domains are read more than once.

    `span`: the first step that reads them and the one that no longer does; None: all of the run's.
    """
    train, given, apart = config.train, config.data.mixer, config.data.document_mask
    if given is None:
        kind = PACKINGS[config.data.packing]
        return kind(corpus.train, train.batch_size, train.sequence_length, config.order_seed, apart=apart)
    if config.data.packing != "stream":
        raise ConfigError(
            f"data.packing: {config.data.packing} fills sequences from all domains, and {KEY} deals them out by "
            "domain; write data.packing=stream, or leave the mixer out"
        )
    sizes = {name: len(DomainText(corpus.train, number)) for number, name in enumerate(corpus.domains)}
    short = [name for name, tokens in sizes.items() if tokens <= train.sequence_length]
    known = {name: tokens for name, tokens in sizes.items() if name not in short}
    if not known:
        raise DataError(
            f"train.sequence_length: no domain has the {train.sequence_length + 1} training tokens of one sequence; "
            f"lower it, or give more text ({', '.join(f'{name}: {tokens:,}' for name, tokens in sizes.items())})"
        )
    first, end = span or (0, train.steps)
    planned = (end - first) * train.batch_size * train.sequence_length
    mixer = registry.build(MIXERS, given, MixContext(known, planned), KEY)
    if not isinstance(mixer, Mixer):
        chosen, _ = registry.select(MIXERS, given, KEY)
        fault = f"returned {article(mixer)}; it must return a moelab.Mixer"
        raise registry.part(MIXERS, given, KEY).fault(fault, chosen.build)
    try:
        batches = MixedBatches(
            corpus.train, corpus.domains, mixer, train.batch_size, train.sequence_length, config.order_seed,
            apart=apart,
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"{KEY}: {error}") from error
    _tell(batches, first, end, short)
    return batches


def mixture_facts(batches: Batches, steps: int, first: int = 0) -> dict[str, Any]:
    """{domain: asked share, read share, epochs} over `steps`, from `first` on; {} without a mixer."""
    return batches.account(steps, first) if isinstance(batches, MixedBatches) else {}


def mixture_metrics(batches: Batches, steps: int, first: int = 0) -> dict[str, float]:
    """The same as tags, of what was read so far."""
    return {
        f"data/{what}/{name}": value
        for name, account in mixture_facts(batches, steps, first).items()
        for what, value in account.items()
    }


def mixture_state(batches: Batches) -> list[Any]:
    """What a checkpoint keeps, to tell whether the run that goes on from it reads the same: [[until, shares], ...]."""
    if not isinstance(batches, MixedBatches):
        return []
    return [[end, wanted.tolist()] for end, wanted in zip(batches.ends, batches.wanted, strict=True)]


def check_mixture(batches: Batches, state: Mapping[str, Any], checkpoint: Path) -> None:
    """Raises ConfigError where the shares that a mixer reckoned are not those that the checkpoint was trained with."""
    if state.get("mixture", []) != mixture_state(batches):
        raise ConfigError(
            f"{KEY}: {checkpoint} was trained with other shares of the domains: a mixer that reckons with the run's "
            "length gives others for another train.steps; write them down (name: weights, or the mixer's `tokens`), or "
            "resume with the steps planned then"
        )


def _tell(batches: MixedBatches, first: int, end: int, short: list[str]) -> None:
    account = batches.account(end, first)
    shares = ", ".join(f"{name} {one['asked']:.1%}" for name, one in account.items())
    logger.info("data.mixer: of the training tokens: %s", shares)
    if short:
        logger.warning(
            "data.mixer: too short for one sequence, and not read: %s; lower train.sequence_length", ", ".join(short)
        )
    again = [f"{name} {one['epochs']:.1f} times" for name, one in account.items() if one["epochs"] > 1]
    if again:
        logger.warning(
            "data.mixer: text that is read more than once in %d steps: %s; give it a smaller share, or more text",
            end - first, ", ".join(again),
        )  # fmt: skip
    unread = [name for name, one in account.items() if one["asked"] == 0 and name not in short]
    if unread:
        logger.warning("data.mixer: no share, so not trained on: %s", ", ".join(unread))
