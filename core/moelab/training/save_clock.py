"""When to save where nobody said so: by the clock, so that what a crash costs doesn't hang on how long a step takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

INTERVAL = 900.0  # seconds: the most that a crash costs
SHARE = 0.01  # of the time, at most, goes into saving; a save that takes long is made less often


@dataclass
class SaveClock:
    """`train.save_every=null`: every 15 minutes, or so rarely that saving takes 1 % of the time."""

    now: Callable[[], float] = time.monotonic
    took: float = 0.0  # seconds, the last save
    last: float = field(init=False)  # when it ended, or the run began

    def __post_init__(self) -> None:
        self.last = self.now()

    def due(self) -> bool:
        return self.now() - self.last >= max(INTERVAL, self.took / SHARE)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measures a save, whoever asked for it."""
        began = self.now()
        yield
        self.last = self.now()
        self.took = self.last - began
