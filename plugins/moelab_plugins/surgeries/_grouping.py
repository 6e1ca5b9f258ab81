"""Which experts are merged, and how their neurons are laid onto each other. E experts, G groups, F neurons."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def cosine_distances(rows: Floats) -> Floats:
    """[E, n] -> [E, E], 1 - cosine."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    return 1 - unit @ unit.T


def euclidean_distances(rows: Floats) -> Floats:
    """[E, n] -> [E, E]."""
    squares = (rows**2).sum(1)
    return np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * rows @ rows.T, 0))


def seldom_together(together: Floats) -> Floats:
    """Tokens of both over tokens of either [E, E] -> 1 - that: small for experts that are chosen together."""
    load = np.diagonal(together)
    either = load[:, None] + load[None] - together
    return 1 - together / np.maximum(either, 1)


def average_linkage(distance: Floats, groups: int) -> list[list[int]]:
    """The two groups of the smallest mean distance become one, until G are left (HC-SMoE, 2410.08589, its default)."""
    members = [[expert] for expert in range(len(distance))]
    between = distance.copy()
    np.fill_diagonal(between, np.inf)
    while len(members) > groups:
        a, b = sorted(np.unravel_index(np.argmin(between), between.shape))
        sizes = len(members[a]), len(members[b])
        mean = (sizes[0] * between[a] + sizes[1] * between[b]) / sum(sizes)
        between[a], between[:, a] = mean, mean
        between[a, a] = np.inf
        between = np.delete(np.delete(between, b, 0), b, 1)
        members[a] += members.pop(b)
    return sorted(sorted(group) for group in members)


def around_dominant(distance: Floats, load: Floats, groups: int) -> list[list[int]]:
    """The G most loaded experts each gather those of the others that are nearest to them (M-SMoE, 2310.01334)."""
    order = np.argsort(-load, kind="stable").tolist()
    found = {expert: [expert] for expert in order[:groups]}
    for expert in order[groups:]:
        found[min(found, key=lambda leader: distance[expert, leader])].append(expert)
    return sorted(sorted(group) for group in found.values())


def matching(gain: Floats) -> npt.NDArray[np.int64]:
    """The permutation p that makes sum_f gain[f, p[f]] largest: [F, F] -> [F].

    The assignment problem by shortest augmenting paths (Jonker and Volgenant 1987, as in textbooks): O(F^3), a row of
    numbers at a time.
    """
    cost, size = -gain, len(gain)
    row_price, column_price = np.zeros(size + 1), np.zeros(size + 1)
    row_of = np.full(size + 1, size)  # of each column; the last column holds the row that is being placed
    for row in range(size):
        row_of[size], column = row, size
        shortest, before = np.full(size, np.inf), np.full(size, size)
        visited = np.zeros(size + 1, bool)
        while row_of[column] != size or column == size:
            visited[column] = True
            here = row_of[column]
            open_columns = ~visited[:size]
            reduced = cost[here] - row_price[here] - column_price[:size]
            better = open_columns & (reduced < shortest)
            shortest[better], before[better] = reduced[better], column
            following = int(np.argmin(np.where(open_columns, shortest, np.inf)))
            step = shortest[following]
            row_price[row_of[visited]] += step
            column_price[visited] -= step
            shortest[open_columns] -= step
            column = following
        while column != size:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    place = np.empty(size, np.int64)
    place[row_of[:size]] = np.arange(size)
    return place
