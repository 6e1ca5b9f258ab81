"""A run's own checkpoints: what goes into one beside its tensors, when it is in its place, and which are kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moelab.atomic import discard
from moelab.checkpoint import BEST, CHECKPOINTS
from moelab.config.stored import seal
from moelab.errors import CheckpointError
from moelab.training.autotune import WAYS
from moelab.training.checkpoint import own_tensors
from moelab.training.format import BEST_EVALUATION, REPLANNED
from moelab.training.loop import Loop, Saving, served_backends
from moelab.training.mixture import mixture_state
from moelab.training.plan import to_json
from moelab.training.resume import PLUGINS, VERSIONS, training_state
from moelab.training.same_run import fixed_environment
from moelab.training.setup import checkpoint_files
from moelab.training.start import COMMIT, OVERRIDES
from moelab.training.summary import BACKENDS, LOADS, versions
from moelab.training.writing import Writing

logger = logging.getLogger("moelab")


def save(loop: Loop, *, prune: bool = True, wait: bool = False) -> None:
    """The newest checkpoint, and away with those that are older than the config keeps.

    Written in the background where the config says so and nobody must `wait` for it.
    """
    settle(loop)
    step = loop.progress.step
    folder = loop.run_dir / CHECKPOINTS / f"step_{step:08d}"
    if loop.saved == step:  # nothing has changed since
        loop.lock.check()
        _prune(loop, folder)  # which a kill may have kept the process that saved from
        return
    _write(loop, folder, _made(loop), {}, partial(_saved, loop, step, folder, prune), wait=wait)


def _saved(loop: Loop, step: int, folder: Path, prune: bool) -> None:
    if prune:
        _prune(loop, folder)
    logger.info("checkpoint: %s", folder.relative_to(loop.run_dir))
    loop.saved = step
    loop.observers.hook.on_save(step=step, path=folder)


def save_best(loop: Loop, beside: Mapping[str, bytes]) -> None:
    """The state of the lowest held-out loss so far in place of the one before it; `beside`: files that go along."""
    settle(loop)
    folder = loop.run_dir / BEST
    line = "best: step %d, held-out loss %.4f: %s"
    told = partial(logger.info, line, loop.progress.step, loop.best.loss, folder.name)
    _write(loop, folder, {"best": True}, beside, told)


def settle_if_done(loop: Loop) -> None:
    """At the end of a step: whether the checkpoint under way is written on every rank, and then its place."""
    if loop.saving is not None and not loop.setup.ranks.any(not loop.saving.writing.done):
        settle(loop)


def settle(loop: Loop) -> None:
    """Wait for the checkpoint under way, if there is one; all ranks together. Raises CheckpointError."""
    saving, loop.saving = loop.saving, None
    if saving is not None:
        with loop.clock.saving():
            loop.lock.check()
            saving.writing.finish()
        saving.then()


def settled(loop: Loop) -> None:
    """`settle` of a run that ends by an error, which is the one to be raised."""
    try:
        settle(loop)
    except CheckpointError as problem:
        logger.warning("%s", problem)


def _made(loop: Loop) -> dict[str, Any]:
    """How the weights of this step came about, beside what the config says."""
    made: dict[str, Any] = {}
    if loop.plan.rewarmed:
        made[REPLANNED] = to_json(loop.plan.rewarmed)
    if loop.ended_early:
        made["patience"] = loop.setup.config.train.patience
    return made


def _write(
    loop: Loop,
    folder: Path,
    made: Mapping[str, Any],
    beside: Mapping[str, bytes],
    then: Callable[[], None],
    *,
    wait: bool = False,
) -> None:
    """`then`: what follows when it is in its place."""
    setup, progress = loop.setup, loop.progress
    loop.lock.check()
    state = progress.state() | {
        "data_fingerprint": setup.corpus.fingerprint,
        PLUGINS: setup.registry.versions(),
        VERSIONS: versions(),
        OVERRIDES: setup.start.overrides,
        COMMIT: setup.start.commit,
        "lineage": setup.lineage.to_json() if setup.lineage else None,
        "mixture": mixture_state(setup.batches),
        "alarms": loop.alarms.state(),
        LOADS: loop.loads,
        BACKENDS: served_backends(loop),
        WAYS: loop.ways.chosen if loop.ways else {},
        REPLANNED: to_json(loop.plan.changes),
        BEST_EVALUATION: loop.best.to_json(),
        **setup.step_settings.objective.state(),
    }
    outside = fixed_environment(setup.config)
    if outside:
        state["environment"] = seal(outside)
    files = checkpoint_files(setup, progress.step, made)
    for own in loop.observers.hook.on_checkpoint(step=progress.step):
        files = {**(own or {}), **files}
    asked = setup.config.train.save_in_background
    background = not wait and (setup.ranks.size > 1 if asked is None else asked)
    with loop.clock.saving():
        own = own_tensors(setup.model, training_state(setup), setup.ranks)
        writing = Writing(
            folder, loop.staging.copies(own) if background else own, state, {**files, **beside}, setup.ranks
        )
        if background:
            writing.start()
            loop.saving = Saving(writing, then)
            return
        writing.write()
        writing.finish()
    then()


def _prune(loop: Loop, newest: Path) -> None:
    """Keep `newest`, which is whole, and those before it that the config asks for; the damaged ones aren't counted.

    What lies after it is damaged: it stays until it is written anew.
    """
    loop.damaged.discard(newest.name)
    keep = loop.setup.config.train.keep_checkpoints
    found = [path for path in sorted(newest.parent.glob("step_*")) if keep and path.name <= newest.name]
    whole = [path for path in found if path.name not in loop.damaged]
    for old in sorted(set(found) - set(whole[-keep:])):
        discard(old)
