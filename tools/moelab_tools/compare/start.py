"""The word about an upcycled model before any training: where it starts, seen from its dense source.

The difference of the losses is judged as everywhere here: paired, one document left out at a time (`contrast.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moelab_tools.compare.contrast import Floats, over_pairs

SAME_KL = 1e-5  # nats: what float32's rounding makes of an equal function in 30 layers is 1e-9 to 1e-8
LOST = 0.5  # of what the dense model had learnt, by the loss: whoever loses more starts broken
LEARNT = 0.1  # nats below uniform from which on a loss can say so

Kind = Literal["dense", "near", "broken", "unknown"]


@dataclass(frozen=True)
class Start:
    """Where a model starts."""

    kind: Kind
    sentence: str
    difference: float  # nats a token, upcycled minus dense
    low: float
    high: float  # of the 95 % interval over documents


def judge_start(dense: Floats, upcycled: Floats, tokens: Floats, kl: float, vocab_size: int, *, text: bool) -> Start:
    """dense, upcycled, tokens [m]: nats and targets of each document; kl in nats a token, from dense to upcycled.

    `text`: whether these are documents, of which a loss says something, and not random ids.
    """
    contrast = over_pairs((upcycled - dense)[None], tokens)
    difference, half = float(contrast.difference), float(contrast.text_half())
    low, high = (difference - half, difference + half) if np.count_nonzero(tokens) > 1 else (-math.inf, math.inf)
    before, after, uniform = dense.sum() / tokens.sum(), upcycled.sum() / tokens.sum(), math.log(vocab_size)
    if kl <= SAME_KL:
        return Start("dense", f"starts at the dense function (KL {kl:.1e})", difference, low, high)
    if not text:
        return Start("unknown", f"starts at a KL of {kl:.2g} nats from the dense model", difference, low, high)
    interval = f"[{low:+.4f}, {high:+.4f}]"
    if uniform - before < LEARNT:
        words = (
            f"the dense model is no better than uniform ({before:.2f} of {uniform:.2f} nats): no loss judges this start"
        )
        return Start("unknown", words, difference, low, high)
    if difference > LOST * (uniform - before):
        words = f"starts broken: {after:.1f} nats, where dense has {before:.2f} and uniform is {uniform:.1f}"
        return Start("broken", words, difference, low, high)
    where = "away from" if difference >= 0 else "below"
    words = f"starts {abs(difference):.4f} nats {where} the dense model {interval}, KL {kl:.2g}"
    if low <= 0 <= high:
        words += "; that much text does not tell the losses apart"
    return Start("near", words, difference, low, high)
