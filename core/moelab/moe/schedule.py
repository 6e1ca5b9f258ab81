"""A factor over the optimizer steps, for coefficients and rates: a pure function of the step, so nothing is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class WeightSchedule:
    """A factor on a coefficient or rate over optimizer steps: rise from 0, stay at 1, fall to `final`."""

    warmup_steps: int = 0  # steps of the rise
    decay_from: int | None = None  # first step of the fall; null: none
    decay_to: int | None = None  # the step from which on it is `final`; null: at once
    final: float = 0.0
    shape: str = "linear"  # of the fall: linear or cosine

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.final < 0:
            raise ValueError("warmup_steps and final must not be negative")
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, not '{self.shape}'")
        if self.decay_to is not None and (self.decay_from is None or self.decay_to < self.decay_from):
            raise ValueError(f"decay_to {self.decay_to} needs a decay_from that is not after it")

    def factor(self, step: int) -> float:
        """The factor at `step`, which counts from 0."""
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.decay_from is None or step < self.decay_from:
            return rise
        length = (self.decay_to if self.decay_to is not None else self.decay_from) - self.decay_from
        done = min(1.0, (step - self.decay_from) / length) if length else 1.0
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return rise * (1 + (self.final - 1) * done)
