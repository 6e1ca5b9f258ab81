"""Ctrl-C once waits for the end of a step, twice acts at once, but never between a step and its line."""

from __future__ import annotations

import os
import signal

import pytest

from moelab.training.interruption import Interruption


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
