"""From a config to a finished checkpoint: plan, look at what is there, make what is missing, commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from moelab.config.upcycle import UpcycleConfig
from moelab.errors import ConfigError
from moelab.hf.moe_formats import MOE_FORMATS
from moelab.paths import user_path
from moelab.registry import Registry
from moelab_upcycling.maker import build_parts
from moelab_upcycling.output import OutputFolder, content_hash
from moelab_upcycling.plan import Plan, make_plan
from moelab_upcycling.same_plan import AXES
from moelab_upcycling.scale import scaled
from moelab_upcycling.source import DenseSource
from moelab_upcycling.target import resolve_target, target_kind
from moelab_upcycling.worker import Job, Progress, do_all, light_registry


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    hashes: dict[str, str]  # tensor -> xxh3-128
    content_hash: str  # of all these; the same however they are sharded
    made: int  # bytes
    kept: int  # bytes of verified shards of an earlier run
    seconds: float
    complete: bool  # the index is written
    shard_seconds: dict[str, float] = field(default_factory=dict)


def registry_of(config: UpcycleConfig, search_path: Sequence[Path] = ()) -> Registry:
    """The plugins of one run, without torch."""
    return light_registry(tuple(config.plugins), config.entry_points, tuple(str(p.resolve()) for p in search_path))


def prepare(config: UpcycleConfig, registry: Registry, search_path: Sequence[Path] = ()) -> Plan:
    """The plan of a config; reads headers and samples of the sources, and writes nothing."""
    sources = [DenseSource(user_path(folder, "source"), registry) for folder in config.sources]
    try:
        opened = sources[0].opened
        config, arithmetic = scaled(config, opened.config, MOE_FORMATS[target_kind(config, opened.config)])
        dense, target = resolve_target(config, opened, registry)
        recipe = replace(config.recipe)
        if not target.shared_intermediate_size:
            recipe.shared = {"name": "zero"}  # nothing is made of it
        for axis, point in AXES.items():
            setattr(recipe, axis, registry.resolve(point, getattr(recipe, axis), f"recipe.{axis}"))
        plan = make_plan(config, dense, target, recipe, sources)
    finally:
        for source in sources:
            source.close()
    plan = replace(plan, arithmetic=arithmetic, search_path=tuple(str(p.resolve()) for p in search_path))
    for layer_id in plan.target.layouts:  # a recipe that does not fit is found here, not in a worker
        build_parts(plan, registry, layer_id)
    return plan


def convert(
    plan: Plan,
    output: Path | None,
    *,
    workers: int = 2,
    layers: range | None = None,
    progress: Progress = lambda nbytes: None,
    announce: Callable[[int, int], None] = lambda remaining, kept: None,
    versions: dict[str, str] | None = None,
) -> Outcome:
    """Make the plan's shards in `output`; None hashes them only.

    `announce(bytes to make, bytes to check)` comes once before any `progress`. Killed at any moment, the same
    call goes on.
    """
    started = time.monotonic()
    chosen = [i for i, shard in enumerate(plan.shards) if layers is None or shard.layer_id in layers]
    if not chosen:
        raise ConfigError(f"--layers: the model has layers 0:{plan.target.num_hidden_layers}")
    if output is None:
        announce(sum(plan.shards[i].data_bytes for i in chosen), 0)
        hashes: dict[str, str] = {}
        seconds: dict[str, float] = {}
        for _, result in do_all(plan, None, [Job(i) for i in chosen], workers, progress):
            hashes |= result.hashes
            seconds[result.file] = result.seconds
        made = sum(plan.shards[i].nbytes for i in chosen)
        return Outcome(hashes, content_hash(plan, hashes), made, 0, time.monotonic() - started, False, seconds)
    folder = OutputFolder(output, plan)
    recorded = folder.recorded() if output.exists() else {}
    present = [i for i in range(len(plan.shards)) if _is_there(output, plan, i, recorded)]
    remaining = sum(plan.shards[i].nbytes for i in chosen if i not in present)
    folder.check_space(remaining)
    with folder.locked(shared=layers is not None):
        folder.begin([plan.shards[i] for i in chosen], versions or {})
        return _Run(plan, folder, recorded, workers, progress, announce).run(chosen, present, started)


def _is_there(output: Path, plan: Plan, index: int, recorded: dict[str, dict[str, str]]) -> bool:
    shard = plan.shards[index]
    path = output / shard.file
    return shard.file in recorded and path.is_file() and path.stat().st_size == shard.nbytes


@dataclass
class _Run:
    plan: Plan
    folder: OutputFolder
    recorded: dict[str, dict[str, str]]
    workers: int
    progress: Progress
    announce: Callable[[int, int], None]

    def run(self, chosen: list[int], present: list[int], started: float) -> Outcome:
        shards, output = self.plan.shards, str(self.folder.folder)
        to_check = [i for i in chosen if i in present]
        to_make = [i for i in chosen if i not in present]
        self.announce(sum(shards[i].data_bytes for i in to_make), sum(shards[i].data_bytes for i in to_check))
        if to_make:
            self.folder.drop_index()
        hashes: dict[str, str] = {}
        seconds: dict[str, float] = {}
        kept = 0
        checks = [Job(i, check=True) for i in to_check]
        for job, result in do_all(self.plan, output, checks, self.workers, self.progress):
            if result.hashes and result.hashes == self.recorded[result.file]:
                hashes |= result.hashes
                kept += result.nbytes
            else:
                self.folder.drop_index()
                to_make.append(job.shard)
        jobs = [Job(i) for i in sorted(to_make)]
        try:
            # closing: the workers have ended before their half-written files are removed
            with closing(do_all(self.plan, output, jobs, self.workers, self.progress)) as results:
                for _, result in results:
                    self.folder.record(result)
                    hashes |= result.hashes
                    seconds[result.file] = result.seconds
        except BaseException:
            self.folder.clean([shards[i] for i in to_make])
            raise
        made = sum(shards[i].nbytes for i in to_make)
        complete = len(hashes) == len(self.plan.tensors)
        if complete:
            self.folder.finish(hashes)
        digest = content_hash(self.plan, hashes)
        return Outcome(hashes, digest, made, kept, time.monotonic() - started, complete, seconds)
