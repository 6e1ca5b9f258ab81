"""One process that makes shards, or checks those that are there. Nothing is shared: any order gives the same bytes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from moelab.checksums import checksum_of_span, running
from moelab.errors import RunFailure
from moelab.hookspecs import (
    DENSE_SOURCES,
    EXPERT_INITIALISERS,
    EXPERT_LAYOUTS,
    OUTPUT_SCALINGS,
    ROUTER_INITIALISERS,
    SHARED_INITIALISERS,
)
from moelab.paths import Places
from moelab.plugin_faults import plugins_told
from moelab.processes import die_with
from moelab.registry import Registry
from moelab_upcycling.dtypes import raw_bytes
from moelab_upcycling.maker import Maker
from moelab_upcycling.plan import Plan, Shard
from moelab_upcycling.source import DenseSource
from moelab_upcycling.writer import NullWriter, ShardWriter

Progress = Callable[[int], None]  # bytes done since the last call


@dataclass(frozen=True)
class Job:
    """Make shard number `shard`, or hash the file that is there."""

    shard: int
    check: bool = False


@dataclass
class ShardResult:
    """What a shard holds."""

    file: str
    nbytes: int = 0
    hashes: dict[str, str] = field(default_factory=dict)  # tensor -> xxh3-128 of its bytes; empty: damaged
    seconds: float = 0.0


def light_registry(plugins: tuple[str, ...], entry_points: bool, search_path: tuple[str, ...]) -> Registry:
    """Sources, layouts and initialisers only, so that no process imports torch for its 300 MB."""
    initialisers = (EXPERT_INITIALISERS, SHARED_INITIALISERS, ROUTER_INITIALISERS, OUTPUT_SCALINGS)
    points = (DENSE_SOURCES, EXPERT_LAYOUTS, *initialisers)
    return Registry(plugins, entry_points, Places(search=tuple(map(Path, search_path))), points=points)


class ShardMaker:
    """Does jobs one after another."""

    def __init__(self, plan: Plan, output: str | None) -> None:
        """output None: the bytes are made and hashed, not kept."""
        self.plan, self.output = plan, output
        registry = light_registry(plan.plugins, plan.entry_points, plan.search_path)
        self.sources = [DenseSource(Path(folder), registry) for folder in plan.sources]
        self.maker = Maker(plan, registry, self.sources)

    def do(self, job: Job, progress: Progress) -> ShardResult:
        started = time.monotonic()
        shard = self.plan.shards[job.shard]
        with plugins_told():
            result = self._check(shard, progress) if job.check else self._make(shard, progress)
        result.seconds = round(time.monotonic() - started, 3)
        return result

    def _make(self, shard: Shard, progress: Progress) -> ShardResult:
        result = ShardResult(shard.file, shard.nbytes)
        writer: ShardWriter | NullWriter = NullWriter()
        if self.output is not None:
            writer = ShardWriter(Path(self.output) / shard.file, shard.nbytes)
        try:
            writer.write(shard.header)
            for tensor in shard.tensors:
                digest = running()
                for piece in self.maker.make(tensor):
                    digest.update(raw_bytes(piece))
                    writer.write(piece)
                result.hashes[tensor.name] = digest.hexdigest()
                progress(tensor.nbytes)
            writer.commit()
        except BaseException:
            writer.abort()
            raise
        return result

    def _check(self, shard: Shard, progress: Progress) -> ShardResult:
        """Hash what is on disk; no hashes where the header is not the planned one."""
        assert self.output is not None
        result = ShardResult(shard.file)
        path = Path(self.output) / shard.file
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if os.fstat(descriptor).st_size != shard.nbytes:
                return result
            if os.pread(descriptor, len(shard.header), 0) != shard.header:
                return result
            for tensor, offset in zip(shard.tensors, shard.offsets, strict=True):
                begin = len(shard.header) + offset
                result.hashes[tensor.name] = checksum_of_span(descriptor, begin, tensor.nbytes, keep_cached=False)
                progress(tensor.nbytes)
        finally:
            os.close(descriptor)
        result.nbytes = shard.nbytes
        return result


def do_all(
    plan: Plan, output: str | None, jobs: list[Job], workers: int, progress: Progress
) -> Generator[tuple[Job, ShardResult], None, None]:
    """Each job's result as it is done. An error in one ends all; none outlives this generator."""
    if not jobs:
        return
    if workers == 1:
        maker = ShardMaker(plan, output)
        for job in jobs:
            yield job, maker.do(job, progress)
        return
    with _processes(plan, output, min(workers, len(jobs))) as pipes:
        waiting, running = list(reversed(jobs)), dict[Connection, Job]()
        for pipe in pipes:
            running[pipe] = waiting.pop()
            pipe.send(running[pipe])
        while running:
            for pipe in [pipe for pipe in wait(list(running)) if isinstance(pipe, Connection)]:
                answer = _receive(pipe)
                if isinstance(answer, int):
                    progress(answer)
                    continue
                if isinstance(answer, MemoryError):
                    raise RunFailure(
                        f"a worker ran out of memory ({answer}); the same command goes on where it stopped: free some "
                        "memory, or give workers=1 (--dry-run says what a worker needs)"
                    ) from answer
                if isinstance(answer, BaseException):
                    raise answer
                job = running.pop(pipe)
                if waiting:
                    running[pipe] = waiting.pop()
                    pipe.send(running[pipe])
                yield job, answer


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        raise RunFailure(
            "a worker process ended without a word: killed, or out of memory (workers=1 needs least); run the same "
            "command again to go on from the finished shards"
        ) from error


@contextmanager
def _processes(plan: Plan, output: str | None, count: int) -> Iterator[list[Connection]]:
    context = get_context("spawn")  # fork would copy the caller's threads and torch
    pipes, processes = [], []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(plan, output, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _serve(plan: Plan, output: str | None, pipe: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    die_with(parent)
    _keep_memory()
    try:
        maker = ShardMaker(plan, output)
        while True:
            pipe.send(maker.do(pipe.recv(), pipe.send))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        pipe.send(error)


def _keep_memory() -> None:
    """Reuse freed blocks, the 136 MB of a source matrix too: fresh pages cost as much time as filling them."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
        if mallopt is not None:
            mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own, which would go back when freed
            mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
