"""A router from prompts, after mergekit's `cheap_embed`: an expert is chosen by what its prompts' words mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moelab import Component, component, hookimpl
from moelab.initialisers import PromptReader, RouterInitialiser, UpcycleContext
from moelab_upcycling.initialisers.router._prompts import PromptOptions, check_prompts, contrasts


@dataclass
class CheapEmbedOptions(PromptOptions):
    pass


class CheapEmbedRouter:
    """Row e = mean embedding of e's positive prompts minus that of its negative ones, at unit norm; in all layers.

    mergekit (a6e4028) sums the tokens of all prompts, each begun with BOS, and scales positives and negatives to unit
    length apart before it subtracts them. Here the mean of each prompt's mean is subtracted as it is, so the two differ
    where there are negatives, or prompts of unequal length.
    """

    def __init__(self, options: CheapEmbedOptions, context: UpcycleContext) -> None:
        check_prompts(options, context)
        self.options = options
        self.std = options.scale * context.hidden_size**-0.5

    def prepare(self, prompts: PromptReader) -> None:
        """Called with the source's tokenizer and embeddings."""

        def mean(texts: list[str]) -> npt.NDArray[np.float64]:
            return np.mean([prompts.embed(prompts.encode(t)).astype(np.float64).mean(axis=0) for t in texts], axis=0)

        self.rows = contrasts(self.options, mean)

    def weight(self) -> npt.NDArray[np.float32]:
        return self.rows


@hookimpl
def moelab_router_initialisers() -> list[Component[UpcycleContext, RouterInitialiser]]:
    return [component("cheap_embed", CheapEmbedOptions, CheapEmbedRouter)]
