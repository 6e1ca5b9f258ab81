"""How long the processes of a run wait for their batches: who reads slowly holds up all of them.

Every process reads its own text, in the process itself; there are no workers that could die without a word.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from moelab.parallel.ranks import Ranks

logger = logging.getLogger("moelab")
SLOW = 0.5  # of the time of the steps: from here on it is told


@dataclass
class Reading:
    """Seconds of this process since the last log, and whether the user has heard of it."""

    seconds: float = 0.0
    told: bool = False

    @contextmanager
    def timed(self) -> Iterator[None]:
        """A batch is read inside."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def metrics(self, step: int, elapsed: float, ranks: Ranks) -> dict[str, float]:
        """`perf/data_share`: the slowest reader's seconds over those of the steps; all ranks call it. Starts over.

        elapsed: seconds of the steps since the last log, as this process took them.
        """
        shares = torch.zeros(ranks.size, dtype=torch.float64)
        shares[ranks.rank] = self.seconds / max(elapsed, 1e-9)
        self.seconds = 0.0
        slowest, rank = ranks.sum(shares).max(0)
        share = min(float(slowest), 1.0)
        if share > SLOW and not self.told:
            self.told = True
            who = f"rank {int(rank)} waits" if ranks.size > 1 else "the run waits"
            logger.warning(
                "step %d: %s for its batches for %.0f %% of the time: look at the disk that holds the data",
                step, who, 100 * share,
            )  # fmt: skip
        return {"perf/data_share": share}
