"""Joining the processes of a run."""

from __future__ import annotations

import logging

import pytest
import torch

from moelab.config.run import ParallelConfig
from moelab.parallel.process_group import joined
from moelab.parallel.ranks import ALONE


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (ParallelConfig(), []),
        (
            ParallelConfig(reshard_after_forward=False),
            ["parallel.reshard_after_forward: without effect, since one process runs"],
        ),
        (
            ParallelConfig(accumulate="pieces", reshard_after_forward=False),
            ["parallel.accumulate, parallel.reshard_after_forward: without effect, since one process runs"],
        ),
    ],
    ids=str,
)
def test_one_process_is_told_of_keys_that_say_nothing_of_it(
    config: ParallelConfig, told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "moelab"), joined(config, torch.device("cpu")) as ranks:
        assert ranks is ALONE
    assert caplog.messages == told
