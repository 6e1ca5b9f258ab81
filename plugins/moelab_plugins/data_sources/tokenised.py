"""What `moelab data` tokenised: a corpus with its split, domains and names, mapped into memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from omegaconf import MISSING

from moelab import Component, Corpus, DataContext, component, hookimpl
from moelab.data.token_cache import DOMAIN, read_token_cache, split_of

logger = logging.getLogger("moelab")


@dataclass
class TokenisedOptions:
    path: str = MISSING  # the folder OUTPUT/tokens that `moelab data` made with `tokens.tokenizer`
    # What counts as a document's domain, in mixing, in losses and loads by domain: `domain`, or tags that it was given;
    # several, as [domain, language], give code/en and so on.
    domain_by: list[str] = field(default_factory=lambda: [DOMAIN])
    verify: bool = True  # read every byte once and compare it with its checksum before training begins


def tokenised(options: TokenisedOptions, context: DataContext) -> Corpus:
    """The folder OUTPUT/tokens of `moelab data`; `data.tokenizer` names the same folder.

    Nothing is tokenised, copied or held in memory. The split was made with the text: `data.validation_fraction` and
    `data.split_seed` say nothing here, and where they differ from the folder's, that is told.
    """
    folder = context.find(options.path)
    corpus = read_token_cache(
        folder, context.tokenizer, context.account, verify=options.verify, domain_by=options.domain_by
    )
    fraction, seed = split_of(folder)
    if (fraction, seed) != (context.validation_fraction, context.split_seed):
        logger.warning(
            "data.source: %s is split already, with validation_fraction %g and split_seed %d; those of `data` are not "
            "used", folder, fraction, seed,
        )  # fmt: skip
    return corpus


@hookimpl
def moelab_data_sources() -> list[Component[DataContext, Corpus]]:
    return [component("tokenised", TokenisedOptions, tokenised)]
