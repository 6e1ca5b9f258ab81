"""Ctrl-C once waits for the end of a step, twice acts at once, but never between a step and its line."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from moelab.config.run import RunConfig
from moelab.training.interruption import Interruption
from moelab.training.trainer import train


def _signal() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_signal_waits_and_the_second_acts_at_once() -> None:
    done = []

    def work() -> None:
        with Interruption() as interruption:
            _signal()
            done.append("first")
            assert interruption.requested
            _signal()
            done.append("second")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["first"]


def test_a_second_signal_waits_for_the_end_of_what_belongs_together() -> None:
    done = []

    def work() -> None:
        with Interruption() as interruption:
            with interruption.held():
                _signal()
                _signal()
                done.append("the line of the step")
            done.append("the next step")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["the line of the step"]


def test_one_signal_in_what_belongs_together_waits_for_the_check() -> None:
    with Interruption() as interruption:
        with interruption.held():
            _signal()
        with pytest.raises(KeyboardInterrupt):
            interruption.check()


def test_the_handlers_from_before_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interruption():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


EARLY = """
import os, signal
from moelab import hookimpl

os.kill(os.getpid(), signal.SIGTERM)

@hookimpl
def moelab_routers():
    return []
"""


def test_a_signal_that_the_process_was_to_ignore_is_heard_before_the_first_step(
    tmp_path: Path, small_run: RunConfig
) -> None:
    """As torchrun's processes under Slurm are started: the run ends as interrupted, when it is built."""
    (tmp_path / "early.py").write_text(EARLY)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        small_run.plugins, small_run.search_path = ["early"], [str(tmp_path)]
        with pytest.raises(KeyboardInterrupt):
            train(small_run)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    summary = json.loads((Path(small_run.run_dir) / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("interrupted", 0)


def test_any_other_signal_of_that_time_is_left_to_who_handles_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption().listening():
        assert signal.getsignal(signal.SIGTERM) == before
