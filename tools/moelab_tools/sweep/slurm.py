"""Runs of a sweep as Slurm jobs, through submitit: the one file that imports it.

A job is the words of a moelab command and nothing else: what it made lies in its run folder, and the words are the
same each time (`train CONFIG --resume`), so that a job that was preempted, or whose time was up, is submitted again
and goes on from the newest checkpoint. A job that is still known is found again by a later sweep, not submitted twice.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moelab.errors import ConfigError, UserError
from moelab.safe_files import Reading, read_object
from moelab.training.run_folder import write_json
from moelab_tools.sweep.launch import Job, Worker

if TYPE_CHECKING:
    import submitit

JOBS, KNOWN = "slurm", "jobs.json"  # a folder in the sweep's, and the ids in it
POLL_SECONDS, ASK_SECONDS = 0.2, 60.0
SAVE_SECONDS = 60  # for a run to save when its job is told to stop; Slurm tells it 90 s before the end


class MoelabJob:
    """What is pickled: the command. submitit calls it on the node, and `checkpoint` when the job must go."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """The exit code of moelab, whose output goes to the job's own log."""
        with _signal_of_submitit_ignored():
            self._process = subprocess.Popen([sys.executable, "-m", "moelab", *self.arguments])
        try:
            while (code := self._process.poll()) is None:  # not `wait`, which would hold a lock from `checkpoint`
                time.sleep(POLL_SECONDS)
        except BaseException:
            self._process.terminate()
            self._process.wait()
            raise
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Let the run save; then the same command, which goes on."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(SAVE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return DelayedSubmission(MoelabJob(self.arguments))

    def __getstate__(self) -> dict[str, Any]:
        return {"arguments": self.arguments, "_process": None}


@contextmanager
def _signal_of_submitit_ignored() -> Iterator[None]:
    """For a process that is started within: Slurm signals all of a job, and this one would end who doesn't know it."""
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, before)


@dataclass
class SubmittedJob:
    """A job somewhere. Its result is looked for; its state is asked for seldom, and without accounting is unknown."""

    job: Any
    asked: float = field(default_factory=time.monotonic)

    def poll(self) -> int | None:
        if not Path(self.job.paths.result_pickle).exists():
            if time.monotonic() - self.asked < ASK_SECONDS:
                return None
            self.asked = time.monotonic()
            if not self.job.done():
                return None
        try:
            return int(self.job.result())
        except Exception as error:  # submitit's own kinds: cancelled, out of memory, timed out too often
            logging.getLogger("moelab").warning("job %s: %s", self.job.job_id, str(error).splitlines()[0][:200])
            return 1

    def stop(self) -> None:
        """Jobs of a cluster go on; the same command finds them again."""


@dataclass
class SubmititWorker:
    """Submits each task, or finds the job that was submitted for it."""

    goes_on: ClassVar[bool] = True  # without the sweep
    out: Path
    executor: Any
    known: dict[str, str] = field(default_factory=dict)  # task -> job id

    def start(self, name: str, arguments: Sequence[str], log: Path) -> Job:
        job = self._still_there(name)
        if job is None:
            self.executor.update_parameters(name=f"moelab_{name}"[:60])
            job = self.executor.submit(MoelabJob(arguments))
            self.known[name] = str(job.job_id)
            write_json(self.out / JOBS / KNOWN, self.known)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        log.symlink_to(Path("..") / Path(job.paths.stdout).resolve().relative_to(self.out.resolve()))
        return SubmittedJob(job)

    def _still_there(self, name: str) -> Any:
        if name not in self.known:
            return None
        job = self.executor.job_class(self.out / JOBS, self.known[name])
        try:
            return None if job.done() else job
        except Exception:  # a cluster that does not know it any more
            return None


def worker_of(out: Path, options: Sequence[str], *, slurm: bool) -> Worker | None:
    """As the command line says it; None: runs are processes of this machine. UserError for options without --slurm."""
    if options and not slurm:
        raise ConfigError(
            f"--slurm-option {options[0]}: goes with --slurm, which is not given; give it, or leave it out"
        )
    return slurm_worker(out, options) if slurm else None


def slurm_worker(out: Path, options: Sequence[str] = (), cluster: str = "slurm") -> Worker:
    """`options`: KEY=VALUE of submitit's update_parameters. `cluster`: "local" runs jobs here, for tests.

    Raises UserError where submitit or Slurm is not there, or it does not know an option.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise UserError("--slurm: submitit is not installed; pip install 'moelab[slurm]'") from error
    if cluster == "slurm" and submitit.AutoExecutor.which() != "slurm":
        raise UserError("--slurm: there is no srun on this machine; run it where Slurm's commands are")
    logging.getLogger("submitit").addFilter(lambda record: "Bypassing sacct error" not in record.getMessage())
    executor = submitit.AutoExecutor(out / JOBS, cluster=cluster)
    executor.update_parameters(stderr_to_stdout=True)
    for option in options:
        key, separator, value = option.partition("=")
        if not separator:
            raise ConfigError(f"--slurm-option: '{option}' is no KEY=VALUE; as in timeout_min=60")
        try:
            executor.update_parameters(**{key: _number(value)})
        except (NameError, ValueError, AssertionError) as error:
            raise ConfigError(f"--slurm-option {option}: {str(error).splitlines()[0]}") from error
    path = out / JOBS / KNOWN
    known = read_object(path, Reading(cure="delete it; jobs that run are then not found")) if path.is_file() else {}
    inner = executor._executor if hasattr(executor, "_executor") else executor
    return SubmititWorker(out, _Named(executor, type(inner).job_class), known)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass
class _Named:
    """submitit's executor with the class of its jobs."""

    executor: Any
    job_class: Any

    def update_parameters(self, **parameters: Any) -> None:
        self.executor.update_parameters(**parameters)

    def submit(self, work: MoelabJob) -> Any:
        return self.executor.submit(work)
