"""A router from prompts, after mergekit's `cheap_embed`: an expert is chosen by what its prompts' words mean."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moelab import Component, ConfigError, component, hookimpl
from moelab.initialisers import PromptReader, RouterInitialiser, UpcycleContext


@dataclass
class CheapEmbedOptions:
    positive: list[list[str]] = field(default_factory=list)  # for each expert, what it is to be chosen for
    negative: list[list[str]] = field(default_factory=list)  # for each expert, what not; may be left out
    scale: float = 1.0  # norm of a row


class CheapEmbedRouter:
    """Row e = mean embedding of e's positive prompts minus that of its negative ones, at unit norm; in all layers.

    mergekit (a6e4028) sums the tokens of all prompts, each begun with BOS, and scales positives and negatives to unit
    length apart before it subtracts them. Here the mean of each prompt's mean is subtracted as it is, so the two differ
    where there are negatives, or prompts of unequal length.
    """

    def __init__(self, options: CheapEmbedOptions, context: UpcycleContext) -> None:
        self.options, experts = options, context.layout.num_experts
        self.std = options.scale * context.hidden_size**-0.5
        for key, prompts in (("positive", options.positive), ("negative", options.negative)):
            if len(prompts) != experts and (key == "positive" or prompts):
                raise ConfigError(
                    f"{key} needs a list of prompts for each of the {experts} experts, has {len(prompts)}"
                )
        if not all(options.positive):
            raise ConfigError("positive: every expert needs at least one prompt")

    def prepare(self, prompts: PromptReader) -> None:
        """Called with the source's tokenizer and embeddings."""

        def mean(texts: list[str]) -> npt.NDArray[np.float64]:
            return np.mean([prompts.embed(prompts.encode(t)).astype(np.float64).mean(axis=0) for t in texts], axis=0)

        rows = []
        for expert, texts in enumerate(self.options.positive):
            row = mean(texts)
            if self.options.negative and self.options.negative[expert]:
                row = row - mean(self.options.negative[expert])
            length = float(np.linalg.norm(row))
            if length == 0:
                raise ConfigError(f"recipe.router: the prompts of expert {expert} cancel each other")
            rows.append(row / length)
        self.rows = (np.stack(rows) * self.options.scale).astype(np.float32)

    def weight(self) -> npt.NDArray[np.float32]:
        return self.rows


@hookimpl
def moelab_router_initialisers() -> list[Component[UpcycleContext, RouterInitialiser]]:
    return [component("cheap_embed", CheapEmbedOptions, CheapEmbedRouter)]
