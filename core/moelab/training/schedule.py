"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from moelab.config.run import ScheduleConfig


def learning_rate_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Factor on `optimizer.lr` for optimizer step `step` (0 .. steps - 1).

    Warm-up is linear and reaches 1 at step `warmup_steps`. `cosine` falls to `min_lr_ratio` at the last step
    (Loshchilov & Hutter 2017); `wsd` stays at 1 and falls linearly over the last `decay_fraction` of the steps
    (MiniCPM, 2404.06395).
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.name == "constant":
        return 1.0
    floor = schedule.min_lr_ratio
    if schedule.name == "wsd":
        decay_steps = max(1, round(schedule.decay_fraction * steps))
        left = min(1.0, (steps - 1 - step) / decay_steps)
        return floor + (1 - floor) * left
    span = max(1, steps - 1 - schedule.warmup_steps)
    progress = (step - schedule.warmup_steps) / span
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
