"""Texts that a language model finds neither too easy nor too hard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import MISSING

from moelab import Component, ConfigError, Document, FilterContext, Rejected, TextFilter, component, hookimpl

if TYPE_CHECKING:
    from moelab.nn.transformer import Transformer


@dataclass
class PerplexityOptions:
    model: str = MISSING  # a run, a checkpoint or a Hugging Face folder, dense or MoE, with its tokenizer
    at_least: float | None = None  # bits per byte: below it a text is too easy, as what repeats itself; null: no limit
    at_most: float | None = None  # bits per byte: above it a text is too hard, as noise; null: no limit
    tokens: int = 512  # of a document's beginning, that are looked at
    trust: bool = False  # import code that the folder names

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise ValueError(f"tokens: {self.tokens}; at least 2")


def perplexity(options: PerplexityOptions, context: FilterContext) -> TextFilter:
    """Keeps documents whose beginning has between `at_least` and `at_most` bits per byte under a model.

    Bits per byte, so that models with different tokenizers, and dense and MoE ones, can take each other's place: the
    loss of all tokens of the beginning but the first, over the bytes of text that these stand for. What the limits
    should be, by domain, a first run with `--report-only` and tight limits shows: the measured figure stands beside
    each example.

    Source: CCNet (1911.00359, section 3.4) keeps by the perplexity of a model; it was not opened for this.
    Use: text without markup noise, of a domain that the model was trained on.
    Cost: a forward pass a document, on the CPU, one thread a process; what the model doesn't know is lost, whatever its
    worth.
    """
    from moelab.integrity import verified
    from moelab.loading import read_model, speech_of

    if options.at_least is None and options.at_most is None:
        raise ConfigError("at_most: without `at_least` or `at_most` every text is kept; give one")
    folder = verified(context.find(options.model))
    model: Transformer = read_model(folder, trust=options.trust)
    tokenizer = speech_of(folder).tokenizer

    def apply(document: Document) -> Document | Rejected:
        ids, counts = tokenizer.encode_with_bytes(document.text)
        bits = bits_per_byte(model, ids[: options.tokens], counts[: options.tokens])
        if bits is None:
            return document  # nothing that could be foretold
        if options.at_least is not None and bits < options.at_least:
            return Rejected("too easy for the model", f"{bits:.3f} bits per byte, at least {options.at_least}")
        if options.at_most is not None and bits > options.at_most:
            return Rejected("too hard for the model", f"{bits:.3f} bits per byte, at most {options.at_most}")
        return document

    return apply


def bits_per_byte(model: Any, ids: np.ndarray, counts: np.ndarray) -> float | None:
    """ids [n], counts [n] bytes of each -> mean over the bytes of all but the first; None where there are none.

    One thread, so that the number of processes changes no digit.
    """
    import torch

    size = int(counts[1:].sum())
    if not size:
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        given = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.no_grad():
            loss = model(given[:, :-1], targets=given[:, 1:]).token_loss
    finally:
        torch.set_num_threads(threads)
    return float(loss.double().sum() / np.log(2) / size)


@hookimpl
def moelab_text_filters() -> list[Component[FilterContext, TextFilter]]:
    return [component("perplexity", PerplexityOptions, perplexity)]
