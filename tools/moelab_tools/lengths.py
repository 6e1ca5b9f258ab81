"""One checkpoint at several lengths: held-out loss, and where in the sequence it is lost."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from moelab.config.run import RunConfig
from moelab.data.batches import ValidationBatches
from moelab.data.corpus import Corpus
from moelab.errors import ConfigError
from moelab.nn.transformer import Transformer
from moelab.registry import Registry
from moelab.training.evaluate import TOKENS_AT_ONCE, evaluate
from moelab.training.precision import Precision
from moelab_tools.positions import Positions

_LENGTH = re.compile(r"([0-9]*\.?[0-9]+)(x?)")


@dataclass(frozen=True)
class AtLength:
    """What a length gave."""

    length: int  # tokens of a sequence
    times: float  # the trained length
    loss: float  # nats a token
    tokens: int  # that were scored
    beyond: float | None  # the loss of tokens with at least the trained length before them; None: there are none
    positions: dict[str, float]  # tokens before the target -> loss
    filled: list[str]  # what the options left out


def parse_lengths(text: str, trained: int) -> list[int]:
    """ "1x,2x,512" -> tokens. Raises ConfigError for what is none."""
    found = []
    for piece in text.split(","):
        match = _LENGTH.fullmatch(piece.strip())
        length = 0 if match is None else round(float(match[1]) * (trained if match[2] else 1))
        if length < 1:
            raise ConfigError(f"--length: '{piece}' is no length; write 1x,2x,4x of the trained one, or tokens: 512")
        found.append(length)
    return found


def at_lengths(
    model: Transformer,
    registry: Registry,
    run: RunConfig,
    corpus: Corpus,
    precision: Precision,
    positions: Positions,
    lengths: str,
) -> list[AtLength]:
    """Each length in turn, over about as many tokens. Raises ConfigError, DataError where the text is too short."""
    trained = run.train.sequence_length
    budget, found = run.evaluation.sequences * trained, []
    for length in parse_lengths(lengths, trained):
        filled = positions.apply(model, registry, length, trained)
        sequences, at_once = max(1, budget // length), max(1, TOKENS_AT_ONCE // length)
        evaluation = evaluate(
            model,
            ValidationBatches(corpus.validation, sequences, length, at_once, apart=run.data.document_mask),
            precision,
        )
        bins = evaluation.places["position"]
        far = [sums for name, sums in bins.items() if int(name.split("-")[0]) >= trained]
        tokens = sum(float(sums.tokens.sum()) for sums in far)
        beyond = sum(float(sums.nats.sum()) for sums in far) / tokens if tokens else None
        by_bin = {name: sums.loss() for name, sums in bins.items()}
        scored = int(evaluation.tokens.sum())
        found.append(AtLength(length, length / trained, evaluation.loss(), scored, beyond, by_bin, filled))
    return found


def length_lines(found: Sequence[AtLength]) -> list[str]:
    """A table, and below it the loss by place at the greatest length."""
    lines = list(dict.fromkeys(line for one in found for line in one.filled))
    print("\n".join(lines), file=sys.stderr, end="\n" if lines else "")
    rows = [f"{'length':>8} {'times':>6} {'nats/token':>11} {'beyond the trained length':>26} {'tokens':>9}"]
    for one in found:
        beyond = "-" if one.beyond is None else f"{one.beyond:.4f}"
        rows.append(f"{one.length:>8} {one.times:>5g}x {one.loss:>11.4f} {beyond:>26} {one.tokens:>9}")
    longest = max(found, key=lambda one: one.length)
    rows += ["", f"by tokens before the target, at {longest.length}"]
    rows += [f"{name:>16} {loss:.4f}" for name, loss in longest.positions.items()]
    return rows
