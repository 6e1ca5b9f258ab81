"""The unit in which held-out loss is counted."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """How held-out loss is counted: lower is better."""

    name: str
    per: str  # the attribute of a document that the nats are divided by
    per_nat: float
    tag: str  # what a run logs in this unit


BITS_PER_BYTE = Measure("bits per byte", "bytes", 1 / math.log(2), "eval/bits_per_byte")  # the same for every tokenizer
NATS_PER_TOKEN = Measure("nats per token", "tokens", 1.0, "eval/loss")  # for data whose bytes are not known
