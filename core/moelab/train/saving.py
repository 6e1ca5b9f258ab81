"""A run's own checkpoints: what goes into one beside its tensors, and which are kept."""

from __future__ import annotations

import logging
from pathlib import Path

from moelab.atomic import discard
from moelab.checkpoint import CHECKPOINTS
from moelab.config.stored import seal
from moelab.train.checkpoint import save_checkpoint
from moelab.train.loop import Loop, served_backends
from moelab.train.plan import REPLANNED, to_json
from moelab.train.resume import PLUGINS, VERSIONS, training_state
from moelab.train.setup import checkpoint_files, fixed_environment
from moelab.train.start import OVERRIDES
from moelab.train.summary import BACKENDS, LOADS, versions

logger = logging.getLogger("moelab")


def save(loop: Loop, *, prune: bool = True) -> None:
    setup, progress = loop.setup, loop.progress
    loop.lock.check()
    folder = loop.run_dir / CHECKPOINTS / f"step_{progress.step:08d}"
    if loop.saved == progress.step:  # nothing has changed since
        _prune(loop, folder)  # which a kill may have kept the process that saved from
        return
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
    }
    outside = fixed_environment(setup.config)
    if outside:
        state["environment"] = seal(outside)
    files = checkpoint_files(setup, progress.step)
    for own in loop.observers.hook.on_checkpoint(step=progress.step):
        files = {**(own or {}), **files}
    with loop.clock.saving():
        save_checkpoint(folder, setup.model, training_state(setup), state, files)
    if prune:
        _prune(loop, folder)
    logger.info("checkpoint: %s", folder.relative_to(loop.run_dir))
    loop.saved = progress.step
    loop.observers.hook.on_save(step=progress.step, path=folder)


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
