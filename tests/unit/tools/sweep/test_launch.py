"""Tasks in the order they allow, so many at a time; processes of this machine; and what Ctrl-C does."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from moelab_tools.sweep.board import Board
from moelab_tools.sweep.launch import Launch, LocalJob, LocalWorker, Outcome, Task, last_words, launch
from sweeping import quiet


@dataclass
class Clock:
    """Jobs that end after so many looks; notes how many ran at once."""

    goes_on: bool = False
    looks: int = 2
    codes: dict[str, int] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    most: int = 0
    started: list[str] = field(default_factory=list)
    each_look: Callable[[], None] = lambda: None

    def start(self, name: str, arguments: Sequence[str], log: Path) -> _Ticking:
        self.running.add(name)
        self.started.append(name)
        self.most = max(self.most, len(self.running))
        return _Ticking(self, name, self.looks)


@dataclass
class _Ticking:
    clock: Clock
    name: str
    left: int
    stopped: int = 0

    def poll(self) -> int | None:
        self.clock.each_look()
        self.left -= 1
        if self.left > 0 and not self.stopped:
            return None
        self.clock.running.discard(self.name)
        return 130 if self.stopped else self.clock.codes.get(self.name, 0)

    def stop(self) -> None:
        self.stopped += 1


def _task(name: str, *after: str, nothing: bool = False) -> Task:
    return Task(name, Path("/dev/null"), lambda: None if nothing else ["x"], after)


def _kinds(outcomes: dict[str, Outcome]) -> dict[str, str]:
    return {name: one.kind for name, one in outcomes.items()}


def test_so_many_run_at_once_and_all_come_to_an_end() -> None:
    clock = Clock()
    outcomes = launch([_task(str(i)) for i in range(5)], clock, quiet(), at_once=2)
    assert set(_kinds(outcomes).values()) == {"finished"}
    assert clock.most == 2
    assert clock.started == ["0", "1", "2", "3", "4"]


def test_a_task_waits_for_those_it_needs_and_is_left_out_when_one_failed() -> None:
    clock = Clock(codes={"dense_1": 1})
    tasks = [_task("arm_0", "dense_0"), _task("arm_1", "dense_1"), _task("last", "arm_1")]
    tasks += [_task("dense_0", nothing=True), _task("dense_1")]
    outcomes = launch(tasks, clock, quiet(), at_once=3)
    assert _kinds(outcomes) == {
        "arm_0": "finished", "arm_1": "not started", "last": "not started", "dense_0": "already finished",
        "dense_1": "failed",
    }  # fmt: skip
    assert "dense_1" in outcomes["arm_1"].why
    assert "arm_0" in clock.started
    assert "dense_0" not in clock.started


def test_after_ctrl_c_nothing_starts_and_what_runs_is_asked_to_end_once() -> None:
    sent: list[int] = []

    def interrupt() -> None:
        if not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    clock = Clock(looks=50, each_look=interrupt)
    with Board(quiet(), 3) as board:
        one = Launch([_task(name) for name in "abc"], clock, 2, board)
        outcomes = one.to_the_end()
    assert _kinds(outcomes) == {"a": "interrupted", "b": "interrupted", "c": "not started"}
    assert clock.started == ["a", "b"]


def test_jobs_of_a_cluster_go_on_when_the_sweep_is_stopped() -> None:
    clock = Clock(goes_on=True, looks=10**9, each_look=lambda: os.kill(os.getpid(), signal.SIGINT))
    outcomes = launch([_task(name) for name in "ab"], clock, quiet())
    assert _kinds(outcomes) == {"a": "interrupted", "b": "not started"}
    assert clock.running == {"a"}, "it was not asked to end"


def test_a_local_process_has_its_log_its_exit_code_and_its_threads(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "x.log"
    outcomes = launch([Task("x", log, lambda: ["trian"])], LocalWorker(3), quiet())
    assert outcomes["x"].kind == "failed"
    assert "did you mean 'train'" in log.read_text()
    assert "exit code 2" in outcomes["x"].why
    job = LocalWorker(3).start("y", ["--help"], log)
    assert isinstance(job, LocalJob)
    assert job.process.wait() == 0
    assert job.poll() == 0


def test_the_threads_of_a_process_are_set_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *words, env, **rest: given.append(env))
    for threads in (3, None):
        LocalWorker(threads).start("x", [], tmp_path / "log")
    assert [one["OMP_NUM_THREADS"] for one in given] == ["3", os.environ["OMP_NUM_THREADS"]]


def test_the_last_words_are_the_errors(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_words(log) == "it said nothing"
    log.write_text("step 1\nfailed: the loss is NaN\nwarning: later\n\n")
    assert last_words(log) == "failed: the loss is NaN"
