"""The word about a model before any training: where it starts, seen from its dense source, or from before surgery.

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
class Wording:
    """What is said of each kind; the two models by their names."""

    same: str
    unread: str  # no text to judge by
    unlearnt: str
    broken: str
    away: str
    below: str


DENSE = Wording(
    same="starts at the dense function (KL {kl:.1e})",
    unread="starts at a KL of {kl:.2g} nats from the dense model",
    unlearnt="the dense model is no better than uniform ({before:.2f} of {uniform:.2f} nats): "
    "no loss judges this start",
    broken="starts broken: {after:.1f} nats, where dense has {before:.2f} and uniform is {uniform:.1f}",
    away="starts {gap:.4f} nats away from the dense model {interval}, KL {kl:.2g}",
    below="starts {gap:.4f} nats below the dense model {interval}, KL {kl:.2g}",
)
OPERATED = Wording(
    same="the same function as before (KL {kl:.1e})",
    unread="a KL of {kl:.2g} nats from the model before",
    unlearnt="the model before is no better than uniform ({before:.2f} of {uniform:.2f} nats): no loss judges this",
    broken="broken: {after:.2f} nats, where it had {before:.2f} and uniform is {uniform:.1f}",
    away="{gap:.4f} nats worse than before {interval}, KL {kl:.2g}",
    below="{gap:.4f} nats better than before {interval}, KL {kl:.2g}",
)


@dataclass(frozen=True)
class Start:
    """Where a model starts."""

    kind: Kind
    sentence: str
    difference: float  # nats a token, upcycled minus dense
    low: float
    high: float  # of the 95 % interval over documents


def judge_start(
    dense: Floats, upcycled: Floats, tokens: Floats, kl: float, vocab_size: int, *, text: bool, words: Wording = DENSE
) -> Start:
    """dense, upcycled, tokens [m]: nats and targets of each document; kl in nats a token, from dense to upcycled.

    `text`: whether these are documents, of which a loss says something, and not random ids. `words`: OPERATED for
    a model before and after surgery.
    """
    contrast = over_pairs((upcycled - dense)[None], tokens)
    difference, half = float(contrast.difference), float(contrast.text_half())
    low, high = (difference - half, difference + half) if np.count_nonzero(tokens) > 1 else (-math.inf, math.inf)
    before, after, uniform = dense.sum() / tokens.sum(), upcycled.sum() / tokens.sum(), math.log(vocab_size)
    figures = {
        "kl": kl, "before": before, "after": after, "uniform": uniform, "gap": abs(difference),
        "interval": f"[{low:+.4f}, {high:+.4f}]",
    }  # fmt: skip

    def told(kind: Kind, sentence: str, rest: str = "") -> Start:
        return Start(kind, sentence.format(**figures) + rest, difference, low, high)

    if kl <= SAME_KL:
        return told("dense", words.same)
    if not text:
        return told("unknown", words.unread)
    if uniform - before < LEARNT:
        return told("unknown", words.unlearnt)
    if difference > LOST * (uniform - before):
        return told("broken", words.broken)
    unsure = "; that much text does not tell the losses apart" if low <= 0 <= high else ""
    return told("near", words.away if difference >= 0 else words.below, unsure)
