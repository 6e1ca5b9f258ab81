"""A router from prompts, after mergekit's `hidden`: an expert is chosen by what the dense model makes of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moelab import Component, component, hookimpl
from moelab.initialisers import PromptReader, RouterInitialiser, UpcycleContext
from moelab_upcycling.initialisers.router._prompts import PromptOptions, check_prompts, contrasts

logger = logging.getLogger("moelab")
TOKENS = ("last", "mean")
DEGENERATE = 5.0  # mergekit's warn_degenerate_gates


@dataclass
class HiddenOptions(PromptOptions):
    tokens: str = "last"  # last: a prompt's last token (mergekit's hidden); mean: of all its tokens (hidden_avg)

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise ValueError(f"tokens must be one of {', '.join(TOKENS)}, not '{self.tokens}'")


class HiddenRouter:
    """Row e of a layer = mean state of e's positive prompts minus that of its negative ones, at unit norm.

    A prompt's state is that of its last token (or the mean over its tokens) in the residual stream that enters the
    layer, hidden_states[layer] of the first source; so the router of layer 0 knows the last token's embedding alone.
    Source: mergekit's moe/router.py (01068e4), gate_mode hidden and hidden_avg. There an expert's prompts are padded to
    one length, and the padding counts; here each prompt stands alone, and begins as the tokenizer begins a text.
    Use: experts from several dense models (`mix`), each with prompts of what it is good at.
    Cost: one forward pass of the first source over all prompts, in float64, in each worker: 2 FLOPs a parameter and
    token. Told where the rows of a layer are nearly the same direction (condition number above 5).
    """

    def __init__(self, options: HiddenOptions, context: UpcycleContext) -> None:
        check_prompts(options, context)
        self.options, self.layer_id = options, context.layer_id
        self.std = options.scale * context.hidden_size**-0.5

    def prepare(self, prompts: PromptReader) -> None:
        """Called with the source's tokenizer and hidden states."""
        texts = sorted({text for lists in (self.options.positive, self.options.negative) for t in lists for text in t})
        states = prompts.hidden(self.layer_id, [prompts.encode(text) for text in texts])
        by_text = {
            text: state[-1] if self.options.tokens == "last" else state.mean(axis=0)
            for text, state in zip(texts, states, strict=True)
        }
        self.rows = contrasts(self.options, lambda asked: np.mean([by_text[text] for text in asked], axis=0))
        if np.linalg.cond(self.rows.astype(np.float64)) > DEGENERATE:
            logger.warning(
                "recipe.router: the rows of layer %d are nearly alike (condition number above %g): its prompts are too "
                "similar there, and some experts will get few tokens", self.layer_id, DEGENERATE,
            )  # fmt: skip

    def weight(self) -> npt.NDArray[np.float32]:
        return self.rows


@hookimpl
def moelab_router_initialisers() -> list[Component[UpcycleContext, RouterInitialiser]]:
    return [component("hidden", HiddenOptions, HiddenRouter)]
