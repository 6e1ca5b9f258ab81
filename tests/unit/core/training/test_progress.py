"""Counters of a run: integers that add up whatever is logged between, and go on exactly after a resume."""

from __future__ import annotations

import json

import pytest
import torch

from moelab.nn.count import ServedCosts
from moelab.training.progress import Interval, Progress, can_continue

COSTS = ServedCosts(token_flops=1000, token_parameters=160, expert_weights=(10, 30, 7))


def steps(progress: Progress, first: int, last: int, log_every: int = 0) -> list[Interval]:
    """Step n has 8 tokens and serves n, 2 n and 1 assignments; -> what each log found."""
    found = []
    for n in range(first, last + 1):
        progress.advance(8, torch.tensor([n, 2 * n, 1]), 0.25)
        if log_every and n % log_every == 0:
            found.append(progress.interval())
    return found


def by_hand(steps_done: int) -> int:
    weights = sum(10 * n + 30 * 2 * n + 7 for n in range(1, steps_done + 1))
    return 8 * steps_done * 1000 + 6 * weights  # 2 FLOPs a weight, forward and twice backward


def test_flops_are_what_was_served_however_often_they_are_read() -> None:
    whole, watched = Progress(COSTS, 5.0), Progress(COSTS, 5.0)
    steps(whole, 1, 9)
    steps(watched, 1, 9, log_every=2)
    assert whole.flops() == watched.flops() == by_hand(9)
    assert whole.flops_declared() == 9 * 8 * 5.0
    assert whole.active_parameters() == 160 + (by_hand(9) - 72_000) / 6 / 72


def test_an_interval_holds_its_own_steps_alone() -> None:
    progress = Progress(COSTS, 5.0)
    steps(progress, 1, 3)
    progress.interval()
    steps(progress, 4, 5)
    since = progress.interval()
    assert (since.seconds, since.tokens, since.flops) == (0.5, 16, by_hand(5) - by_hand(3))
    assert since.counts == (4 + 5, 2 * (4 + 5), 2)  # of each expert, steps 4 and 5
    assert since.active_parameters == 160 + (10 * 9 + 60 * 9 + 14) / 16


@pytest.mark.parametrize("log_every", [1, 2, 4])
def test_a_resumed_run_goes_on_exactly(log_every: int) -> None:
    """Killed at step 3, between two logs: the next interval begins at the last log, as if nothing had happened."""
    whole, killed = Progress(COSTS, 5.0), Progress(COSTS, 5.0)
    uninterrupted = steps(whole, 1, 6, log_every)
    before = steps(killed, 1, 3, log_every)
    state = json.loads(json.dumps(killed.state()))
    assert can_continue(state)
    resumed = Progress.of(state, COSTS, 5.0)
    assert [*before, *steps(resumed, 4, 6, log_every)] == uninterrupted
    assert resumed.state() == whole.state()
    assert resumed.row() == whole.row()
    assert resumed.interval() == whole.interval()


def test_tokens_cost_what_they_did_when_they_were_read() -> None:
    """A stage of other sequences: three steps at 1000 FLOPs a token, two at 1500, killed after the first of them."""
    longer = ServedCosts(1500, COSTS.token_parameters, COSTS.expert_weights)
    whole, killed = Progress(COSTS, 5.0), Progress(COSTS, 5.0)
    for progress in (whole, killed):
        steps(progress, 1, 3)
        progress.interval()
        progress.go_on(longer, 7.5)
        steps(progress, 4, 4)
    resumed = Progress.of(json.loads(json.dumps(killed.state())), longer, 7.5)
    for progress in (whole, resumed):
        steps(progress, 5, 5)
        assert progress.flops() == by_hand(5) + 2 * 8 * 500
        assert progress.flops_declared() == 3 * 8 * 5.0 + 2 * 8 * 7.5
        assert progress.interval().flops == by_hand(5) - by_hand(3) + 2 * 8 * 500
    assert resumed.state() == whole.state()


def test_flops_of_a_long_run_of_a_large_model_stay_exact() -> None:
    """1e24 FLOPs are beyond what a float64 counts to the last digit."""
    costs = ServedCosts(3 * 10**10, 14 * 10**9, (3 * 3584 * 2560,))
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "served_weights": 10**23, "logged": [0, 0, 0]}
    progress = Progress.of(state, costs, 1.0)
    progress.advance(1, torch.tensor([1]), 1.0)
    assert progress.flops() == 3 * 10**10 + 6 * (10**23 + 3 * 3584 * 2560)


def test_a_checkpoint_without_the_count_can_not_go_on() -> None:
    assert not can_continue({"step": 3, "tokens": 24, "flops": 1.0, "seconds": 0.5})
