"""A run's own checkpoints: what goes into one beside its tensors, and which are kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moelab.atomic import discard
from moelab.checkpoint import BEST, CHECKPOINTS
from moelab.config.stored import seal
from moelab.training.checkpoint import save_checkpoint
from moelab.training.format import BEST_EVALUATION, REPLANNED
from moelab.training.loop import Loop, served_backends
from moelab.training.plan import to_json
from moelab.training.resume import PLUGINS, VERSIONS, training_state
from moelab.training.setup import checkpoint_files, fixed_environment
from moelab.training.start import OVERRIDES
from moelab.training.summary import BACKENDS, LOADS, versions

logger = logging.getLogger("moelab")


def save(loop: Loop, *, prune: bool = True) -> None:
    """The newest checkpoint, and away with those that are older than the config keeps."""
    folder = loop.run_dir / CHECKPOINTS / f"step_{loop.progress.step:08d}"
    if loop.saved == loop.progress.step:  # nothing has changed since
        loop.lock.check()
        _prune(loop, folder)  # which a kill may have kept the process that saved from
        return
    _write(loop, folder, _made(loop), {})
    if prune:
        _prune(loop, folder)
    logger.info("checkpoint: %s", folder.relative_to(loop.run_dir))
    loop.saved = loop.progress.step
    loop.observers.hook.on_save(step=loop.progress.step, path=folder)


def save_best(loop: Loop, beside: Mapping[str, bytes]) -> None:
    """The state of the lowest held-out loss so far in place of the one before it; `beside`: files that go along."""
    folder = loop.run_dir / BEST
    _write(loop, folder, {"best": True}, beside)
    logger.info("best: step %d, held-out loss %.4f: %s", loop.progress.step, loop.best.loss, folder.name)


def _made(loop: Loop) -> dict[str, Any]:
    """How the weights of this step came about, beside what the config says."""
    made: dict[str, Any] = {}
    if loop.plan.rewarmed:
        made[REPLANNED] = to_json(loop.plan.rewarmed)
    if loop.ended_early:
        made["patience"] = loop.setup.config.train.patience
    return made


def _write(loop: Loop, folder: Path, made: Mapping[str, Any], beside: Mapping[str, bytes]) -> None:
    setup, progress = loop.setup, loop.progress
    loop.lock.check()
    state = progress.state() | {
        "data_fingerprint": setup.corpus.fingerprint,
        PLUGINS: setup.registry.versions(),
        VERSIONS: versions(),
        OVERRIDES: setup.start.overrides,
        "lineage": setup.lineage.to_json() if setup.lineage else None,
        "alarms": loop.alarms.state(),
        LOADS: loop.loads,
        BACKENDS: served_backends(loop),
        REPLANNED: to_json(loop.plan.changes),
        BEST_EVALUATION: loop.best.to_json(),
    }
    outside = fixed_environment(setup.config)
    if outside:
        state["environment"] = seal(outside)
    files = checkpoint_files(setup, progress.step, made)
    for own in loop.observers.hook.on_checkpoint(step=progress.step):
        files = {**(own or {}), **files}
    with loop.clock.saving():
        save_checkpoint(folder, setup.model, training_state(setup), state, {**files, **beside}, setup.ranks)


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
