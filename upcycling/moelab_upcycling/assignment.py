"""Which dense neurons go to which expert, when experts are cut from shuffled copies of the FFN laid end to end."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moelab_upcycling.neurons import Streams
from moelab_upcycling.streams import permutation


def cut_from_copies(
    streams: Streams, intermediate_size: int, experts: int, width: int, *, dedup: bool
) -> npt.NDArray[np.int32]:
    """-> [experts, width] neuron ids. Qwen2 report 2.2.2: ceil(experts * width / F) copies, each shuffled by itself.

    18944 = 7.4 * 2560, so nine copies make 64 experts only if an expert may straddle two of them. With `dedup`
    (width <= F) no expert then holds a neuron twice, and every copy is still a permutation.
    """
    copies = -(-experts * width // intermediate_size)
    shuffled = [permutation(streams("copy", c), intermediate_size) for c in range(copies)]
    if dedup:
        for c in range(copies - 1):
            end = (c + 1) * intermediate_size  # where copy c ends, as a position in the row of all copies
            tail = end % width  # what the straddling expert takes from copy c
            if tail and end < experts * width:
                _swap_twins(shuffled[c][intermediate_size - tail :], shuffled[c + 1], width - tail)
    return np.concatenate(shuffled)[: experts * width].reshape(experts, width)


def _swap_twins(tail: npt.NDArray[np.int32], following: npt.NDArray[np.int32], head: int) -> None:
    """Swap those of following[:head] that stand in `tail` with the next later entries that don't. In place."""
    seen = set(tail.tolist())
    later = head
    for place in range(min(head, len(following))):
        if int(following[place]) not in seen:
            continue
        while int(following[later]) in seen:
            later += 1
        following[place], following[later] = following[later], following[place]
        later += 1
