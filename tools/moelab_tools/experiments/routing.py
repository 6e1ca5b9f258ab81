"""`routes` of an experiment: how far its runs still send held-out text where what they began from sends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from omegaconf import MISSING

from moelab.errors import ConfigError, near


@dataclass
class Routing:
    """What the end of every run is compared with, and on how much text."""

    against: str = MISSING  # a step of `prepare` that trains, of the same seed
    tokens: int = 16384  # held-out ones, about, evenly over domains

    def check(self, steps: Mapping[str, bool]) -> None:
        """Raise ConfigError naming the key. `steps`: the names of `prepare`, and whether a run comes of each."""
        runs = [name for name, trains in steps.items() if trains]
        if self.against not in runs:
            raise ConfigError(
                f"routes.against: '{self.against}' is no step of `prepare` that trains{near(self.against, runs)} They "
                f"are: {', '.join(runs) or 'none'}"
            )
        if self.tokens < 1:
            raise ConfigError(f"routes.tokens: must be at least 1, not {self.tokens}")
