"""Does the router know the better route? The question of arXiv 2605.07260, put to one of our own models.

There (abstract read; the sections on method were not opened) each token's route is compared with sampled routes of
equal compute by the probability that each gives to the token that really comes next: the router is said to know the
better one where the model is confident, and to say nothing on fragile tokens.

Here: the last MoE layer is changed; alternatives are drawn in proportion to the router's scores (Gumbel top-K), with
the weights of the router's own slots; "confident" and "fragile" are next-token probabilities of at least 0.9 and below
0.5. These are ours, the paper's were not opened.

**A trap, shown beside.** Tokens called fragile because the router's own route gave them little are partly those on
which that route was unlucky, so the alternatives look better for no merit of theirs. So the classes are also formed by
the mean probability under half of the alternatives, and the route is judged against the other half: nothing that is
judged has then picked its own class. What is left is the router's; what went was regression to the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moelab.moe.overrides import Sampled
from moelab.routes.counterfactuals import by_layer, losses
from moelab.seeds import derive_seed
from moelab_tools.routes.asked import layers_of
from moelab_tools.routes.effects import Text
from moelab_tools.routes.intervals import Estimate, estimates
from moelab_tools.routes.source import Source
from moelab_tools.waiting import Waiting

SAMPLES = 16  # alternatives; even, so that they have halves
BOUNDS = (("confident, p >= 0.9", 0.9, 1.01), ("between", 0.5, 0.9), ("fragile, p < 0.5", -1.0, 0.5))


@dataclass(frozen=True)
class Row:
    """One class of tokens."""

    name: str
    tokens: int
    advantage: Estimate  # share of alternatives that the router's route beats, ties for half, less 0.5
    change: Estimate  # mean loss of the alternatives less the route's own, nats a token
    beaten: float  # share of tokens of which some alternative has less loss

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens, "name": self.name, "beats_share_of_alternatives_less_half": self.advantage.to_json(),
            "alternatives_mean_loss_less_own": self.change.to_json(), "share_with_a_better_alternative": self.beaten,
        }  # fmt: skip


@dataclass(frozen=True)
class Alternatives:
    """The last MoE layer's routes against samples."""

    layer: int
    tokens: int
    by_own: Sequence[Row]
    by_others: Sequence[Row]

    def lines(self) -> list[str]:
        head = f"{'tokens':<19} {'number':>8} {'beats - 0.5':<24} {'alternatives, nats'}"
        said = [
            f"layer {self.layer}, {self.tokens:,} tokens: the router's route against {SAMPLES} sampled ones",
            "beats: share of alternatives with more loss, ties for half; less 0.5 it is 0 where the router knows "
            "nothing. alternatives: what they lose more than the route, on average",
            "",
            "classes by the route's own probability, as published (flatters the alternatives):",
            head,
            *map(_line, self.by_own),
            "",
            "classes by half of the alternatives, judged against the other half:",
            head,
            *map(_line, self.by_others),
            "",
            f"with a better one among {SAMPLES}: "
            + ", ".join(f"{row.name.split(',')[0]} {100 * row.beaten:.0f} %" for row in self.by_own)
            + f" (a route that knows nothing: {100 * SAMPLES / (SAMPLES + 1):.0f} %)",
        ]
        return [*said, *self._verdicts()]

    def _verdicts(self) -> list[str]:
        said = []
        for row in self.by_others:
            low, high = row.advantage.low, row.advantage.high
            word = "not resolved"
            if low is not None and low > 0:
                word = "the router's route is the better one"
            elif high is not None and high < 0:
                word = "the alternatives are the better ones"
            said.append(f"{row.name.split(',')[0]} tokens: {word}")
        return said

    def to_json(self) -> dict[str, Any]:
        return {
            "study": "alternatives", "layer": self.layer, "samples": SAMPLES, "tokens": self.tokens,
            "classes_by_own_probability": [row.to_json() for row in self.by_own],
            "classes_by_half_of_the_alternatives": [row.to_json() for row in self.by_others],
        }  # fmt: skip


def alternatives(source: Source, text: Text, *, seed: int) -> Alternatives:
    """Holds SAMPLES + 1 losses of every token in memory."""
    layer = max(layers_of(source.model))
    asked = [by_layer({layer: Sampled(derive_seed(seed, "sample", n), temperature=1.0)}) for n in range(SAMPLES)]
    with Waiting("sampling routes", len(text.batches) * SAMPLES) as waiting:
        columns: list[list[np.ndarray]] = [[] for _ in range(SAMPLES + 1)]
        documents = []
        for told in losses(source.model, text.batches, source.precision, asked):
            assert told.loss is not None
            columns[told.index + 1].append(told.loss.reshape(-1).double().numpy())
            if told.index < 0:
                assert told.batch.target_document_id is not None
                documents.append(told.batch.target_document_id.reshape(-1).numpy())
            else:
                waiting.step()
    own, *others = (np.concatenate(column) for column in columns)
    document = np.unique(np.concatenate(documents), return_inverse=True)[1]
    sampled = np.stack(others)  # [SAMPLES, T]
    half = SAMPLES // 2
    return Alternatives(
        layer, len(own),
        _rows(np.exp(-own), own, sampled, document),
        _rows(np.exp(-sampled[:half]).mean(0), own, sampled[half:], document),
    )  # fmt: skip


def _rows(probability: np.ndarray, own: np.ndarray, others: np.ndarray, document: np.ndarray) -> list[Row]:
    """probability, own, document [T], others [n, T] -> a row for each class that has tokens, and one for all."""
    beats = (others > own).mean(0) + (others == own).mean(0) / 2 - 0.5
    change = others.mean(0) - own
    some = others.min(0) < own
    found = []
    for name, low, high in (*BOUNDS, ("all", -1.0, 1.01)):
        mine = (probability >= low) & (probability < high)
        if not mine.any():
            continue
        size = np.bincount(document[mine]).astype(np.float64)
        sums = np.stack([np.bincount(document[mine], values[mine]) for values in (beats, change)])
        advantage, cost = estimates(sums, size)
        found.append(Row(name, int(mine.sum()), advantage, cost, float(some[mine].mean())))
    return found


def _line(row: Row) -> str:
    return f"{row.name:<19} {row.tokens:>8,} {row.advantage.told(3):<24} {row.change.told()}"
