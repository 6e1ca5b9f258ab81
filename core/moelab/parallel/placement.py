"""Which experts lie together on a rank: an order of the experts, of which each rank holds a run of E / R.

Relabelling experts changes no function, so an order can be applied to any model: the router's rows and the experts' own
weights are put in it. A layer takes as long as its fullest rank.

E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence


def contiguous(loads: Sequence[float], ranks: int) -> list[int]:
    """As they are: [E]."""
    del ranks
    return list(range(len(loads)))


def by_load(loads: Sequence[float], ranks: int) -> list[int]:
    """Even sums of recorded loads: each expert, the fullest first, to the least loaded rank with room. [E] -> [E].

    Longest processing time first (Graham 1969), with as many experts for each rank, as DeepSeek's EPLB packs its own
    (github.com/deepseek-ai/EPLB: balanced_packing), which also copies the fullest: that is not done here.
    """
    room = len(loads) // ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0.0] * ranks
    for expert in sorted(range(len(loads)), key=lambda expert: (-loads[expert], expert)):
        rank = min((rank for rank in range(ranks) if len(held[rank]) < room), key=lambda rank: (sums[rank], rank))
        held[rank].append(expert)
        sums[rank] += loads[expert]
    return [expert for mine in held for expert in sorted(mine)]


def violation(loads: Sequence[float], order: Sequence[int], ranks: int) -> float:
    """By how much the fullest rank has more than the mean, as `moe/layer_NN/rank_violation` says: 0 .. R - 1."""
    each = len(order) // ranks
    sums = [sum(loads[expert] for expert in order[first : first + each]) for first in range(0, len(order), each)]
    return max(sums) * ranks / sum(sums) - 1
