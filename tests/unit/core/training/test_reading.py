"""Who waits for its batches is named, once."""

from __future__ import annotations

import logging

import pytest
import torch

from moelab.parallel.ranks import ALONE, Ranks
from moelab.training.reading import Reading


class Three(Ranks):
    """Rank 1 of three, of which rank 2 read for nine tenths of the time."""

    rank, size = 1, 3

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value + torch.tensor([0.1, 0.0, 0.9])


def test_the_slowest_reader_counts_and_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    reading = Reading(seconds=1.0)
    with caplog.at_level(logging.WARNING, logger="moelab"):
        assert reading.metrics(10, 5.0, Three()) == {"perf/data_share": pytest.approx(0.9)}
        assert reading.metrics(20, 5.0, Three()) == {"perf/data_share": pytest.approx(0.9)}
    assert [record.getMessage().split(":")[1] for record in caplog.records] == [
        " rank 2 waits for its batches for 90 % of the time"
    ]


def test_a_process_alone_counts_what_it_read_since_the_last_log() -> None:
    reading = Reading()
    with reading.timed():
        pass
    assert 0 < reading.seconds < 60
    reading.seconds = 1.0
    assert reading.metrics(10, 4.0, ALONE) == {"perf/data_share": 0.25}
    assert reading.metrics(20, 4.0, ALONE) == {"perf/data_share": 0.0}
