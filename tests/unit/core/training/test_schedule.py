"""Learning-rate schedules at the steps where their value is known."""

from __future__ import annotations

import pytest

from moelab.config.run import ScheduleConfig
from moelab.training.schedule import learning_rate_factor


def test_warm_up_rises_linearly_to_one() -> None:
    schedule = ScheduleConfig(name="constant", warmup_steps=4)
    assert [learning_rate_factor(schedule, s, 10) for s in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


def test_cosine_starts_at_one_halves_midway_and_ends_at_the_floor() -> None:
    schedule = ScheduleConfig(name="cosine", warmup_steps=0, min_lr_ratio=0.1)
    assert learning_rate_factor(schedule, 0, 101) == pytest.approx(1.0)
    assert learning_rate_factor(schedule, 50, 101) == pytest.approx(0.55)
    assert learning_rate_factor(schedule, 100, 101) == pytest.approx(0.1)


def test_wsd_is_flat_then_linear() -> None:
    schedule = ScheduleConfig(name="wsd", warmup_steps=0, min_lr_ratio=0.0, decay_fraction=0.2)
    factors = [learning_rate_factor(schedule, s, 100) for s in range(100)]
    assert factors[:80] == [1.0] * 80
    assert factors[89] == pytest.approx(0.5)
    assert factors[99] == 0.0
