"""Runs tasks as processes, some at a time, in the order that they allow; shows where each is, and how each ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from rich.console import Console

from moelab.errors import UserError
from moelab.printable import printable
from moelab.training.interruption import Interruption
from moelab_tools.sweep.board import Board, tail

POLL_SECONDS = 0.2
LONGEST_WORDS = 400  # of a process that failed
Kind = Literal["finished", "already finished", "failed", "not started", "interrupted", "running"]


@dataclass(frozen=True)
class Task:
    """One call of moelab."""

    name: str
    log: Path
    arguments: Callable[[], list[str] | None]  # asked when its turn has come; None: nothing is left to do
    after: tuple[str, ...] = ()  # tasks that must have ended well
    metrics: Path | None = None  # a metrics.jsonl that tells how far it is
    steps: int = 0
    done: Callable[[], None] = lambda: None  # called when it has ended well


@dataclass(frozen=True)
class Outcome:
    """How a task ended; `why` in a sentence where it did not end well."""

    kind: Kind
    why: str = ""
    seconds: float = 0.0

    @property
    def well(self) -> bool:
        return self.kind in ("finished", "already finished")


class Job(Protocol):
    """A process that runs somewhere."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def stop(self) -> None:
        """Ask it to save and to end; asked again, at once."""


class Worker(Protocol):
    """Where jobs run."""

    @property
    def goes_on(self) -> bool:
        """Whether jobs outlive the sweep that started them."""

    def start(self, name: str, arguments: Sequence[str], log: Path) -> Job: ...


@dataclass
class LocalWorker:
    """This machine. Each process has its own session, so that Ctrl-C reaches it once, from here."""

    goes_on: ClassVar[bool] = False
    threads: int | None = None  # of each process; None: as many as torch takes

    def start(self, name: str, arguments: Sequence[str], log: Path) -> Job:
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "moelab", *arguments],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        return LocalJob(process)


@dataclass
class LocalJob:
    process: subprocess.Popen[bytes]

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()


@dataclass
class _Running:
    task: Task
    job: Job
    started: float


@dataclass
class Launch:
    """All tasks of a sweep on their way."""

    tasks: Sequence[Task]
    worker: Worker
    at_once: int
    board: Board
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    running: dict[str, _Running] = field(default_factory=dict)

    def to_the_end(self) -> dict[str, Outcome]:
        """Until every task has ended. After Ctrl-C none is started, and those that run save first."""
        interruption = Interruption()
        stopping = False
        try:
            with interruption:
                while self.running or (not interruption.requested and self._start_some()):
                    if interruption.requested and self.worker.goes_on:
                        self.board.say("stopped looking; the jobs go on, and the same command finds them again")
                        break
                    if interruption.requested and not stopping:
                        stopping = True
                        self.board.say("stopping: the runs save their step, then end; the same command goes on")
                        self._stop()
                    time.sleep(POLL_SECONDS)
                    self._collect(stopping)
                    if not interruption.requested:
                        self._start_some()
        except KeyboardInterrupt:  # a second one
            self._stop()
            stopping = True
        for task in self.tasks:
            if task.name not in self.outcomes:
                kind: Kind = "interrupted" if task.name in self.running else "not started"
                self.outcomes[task.name] = Outcome(kind, "the sweep was stopped")
        return {task.name: self.outcomes[task.name] for task in self.tasks}

    def _stop(self) -> None:
        for one in self.running.values():
            one.job.stop()

    def _start_some(self) -> bool:
        """Fill the free places; -> whether something runs."""
        for task in self.tasks:
            if len(self.running) >= self.at_once:
                break
            if task.name in self.outcomes or task.name in self.running:
                continue
            lost = [name for name in task.after if name in self.outcomes and not self.outcomes[name].well]
            if lost:
                self._ended(task, Outcome("not started", f"{lost[0]} did not end well"))
            elif all(name in self.outcomes for name in task.after):
                self._start(task)
        return bool(self.running)

    def _start(self, task: Task) -> None:
        try:
            arguments = task.arguments()
        except UserError as error:
            self._ended(task, Outcome("failed", str(error)))
            return
        if arguments is None:
            self._ended(task, Outcome("already finished"))
            return
        self.board.begin(task.name, task.metrics, task.steps)
        self.running[task.name] = _Running(task, self.worker.start(task.name, arguments, task.log), time.monotonic())

    def _collect(self, stopping: bool) -> None:
        for name, one in list(self.running.items()):
            code = one.job.poll()
            self.board.look(name)
            if code is None:
                continue
            del self.running[name]
            seconds = time.monotonic() - one.started
            if code == 0:
                one.task.done()
                outcome = Outcome("finished", seconds=seconds)
            elif stopping:
                outcome = Outcome("interrupted", "stopped", seconds)
            else:
                outcome = Outcome("failed", f"{last_words(one.task.log)} (exit code {code}; {one.task.log})", seconds)
            self._ended(one.task, outcome)

    def _ended(self, task: Task, outcome: Outcome) -> None:
        self.outcomes[task.name] = outcome
        self.board.end(task.name, outcome.kind, outcome.why, outcome.seconds)


def launch(
    tasks: Sequence[Task],
    worker: Worker,
    console: Console,
    *,
    at_once: int = 1,
    known: Mapping[str, Outcome] | None = None,
) -> dict[str, Outcome]:
    """Run them all; one that fails is told, and the others go on. `known`: of tasks that ended before."""
    known = known or {}
    with Board(console, sum(task.name not in known for task in tasks)) as board:
        return Launch(tasks, worker, at_once, board, dict(known)).to_the_end()


def last_words(log: Path) -> str:
    """What a process said last, mostly `error: ...`."""
    lines = [line.strip() for line in tail(log).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("error: ", "failed: "))]
    return printable((told or lines or ["it said nothing"])[-1], LONGEST_WORDS)
