"""Do experts mean anything? Mutual information of the expert with a label, and given the token.

A assignments: one draw each of (expert, token id, label). Everything is a plug-in estimate from counts in float64, in
nats, and biased upwards: by about (cells - rows - columns + 1) / 2A for two variables (Miller 1955, not opened), more
where counts are thin, as they are given the token. So none is read alone: beside each stands what chance gives with
the same counts, labels moved between whole documents, since tokens of one document are not independent draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Information:
    """I(expert; label) against what chance gives; all in nats, `share` as a part of what there is to know."""

    nats: float
    entropy: float  # of the label, or of the label given the token: the most that an expert could tell
    chance: float  # mean over permutations
    chance_high: float  # their 95 % point

    @property
    def share(self) -> float:
        """0 nothing .. 1 everything; 0 where there is nothing to tell."""
        return self.nats / self.entropy if self.entropy > 0 else 0.0

    @property
    def chance_share(self) -> float:
        return self.chance / self.entropy if self.entropy > 0 else 0.0

    @property
    def beyond_chance(self) -> bool:
        return self.nats > self.chance_high


def entropy(*variables: np.ndarray) -> float:
    """H of one variable, or of several together, in nats: each [A] non-negative integers."""
    joint = _joined(*variables)
    counts = np.unique(joint, return_counts=True)[1]
    if len(counts) == 0:
        return 0.0
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """I(a; b) = H(a) + H(b) - H(a, b), in nats, not below 0."""
    return max(0.0, entropy(a) + entropy(b) - entropy(a, b))


def conditional_information(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> float:
    """I(a; b | given) = H(a, g) + H(b, g) - H(a, b, g) - H(g), in nats, not below 0."""
    return max(0.0, entropy(a, given) + entropy(b, given) - entropy(a, b, given) - entropy(given))


def information_about(
    expert: np.ndarray,
    label: np.ndarray,
    document: np.ndarray,
    label_of_document: np.ndarray,
    *,
    token: np.ndarray | None = None,
    permutations: int = 40,
    seed: int = 0,
) -> Information:
    """I(expert; label), or with `token` I(expert; label | token), beside permutations of labels over documents.

    expert, label, document, token [A]; label_of_document [n]: `label` is label_of_document[document].
    """
    measure: Callable[[np.ndarray], float]
    if token is None:
        fixed, most = entropy(expert), entropy(label)

        def measure(labels: np.ndarray) -> float:
            return max(0.0, fixed + entropy(labels) - entropy(expert, labels))
    else:
        pair = _joined(expert, token)
        fixed, most = entropy(pair) - entropy(token), entropy(label, token) - entropy(token)

        def measure(labels: np.ndarray) -> float:
            return max(0.0, fixed + entropy(labels, token) - entropy(pair, labels))

    chance = np.random.default_rng(seed)
    present = np.unique(document)
    drawn = []
    for _ in range(permutations):
        moved = label_of_document.copy()
        moved[present] = chance.permutation(label_of_document[present])
        drawn.append(measure(moved[document]))
    return Information(measure(label), most, float(np.mean(drawn)), float(np.quantile(drawn, 0.95)))


def _joined(*variables: np.ndarray) -> np.ndarray:
    """One number for each combination: [A] int64, small enough for any that fit memory."""
    joint = np.unique(variables[0], return_inverse=True)[1].astype(np.int64)
    for variable in variables[1:]:
        place = np.unique(variable, return_inverse=True)[1].astype(np.int64)
        joint = joint * (int(place.max(initial=0)) + 1) + place
    return joint
