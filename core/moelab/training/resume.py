"""Going on from a checkpoint: which one, what its state.json must say, and what is other than it was then."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moelab.checkpoint import STATE, read_run_config, read_state
from moelab.errors import CheckpointError, UserError
from moelab.integrity import Choice
from moelab.lock import LOCK
from moelab.records import Record
from moelab.safe_files import Reading
from moelab.training.borders import enter, number_at
from moelab.training.checkpoint import TrainingState, restore_checkpoint
from moelab.training.mixture import check_mixture
from moelab.training.plan import Plan, plan_of
from moelab.training.progress import can_continue
from moelab.training.same_run import check_same_run
from moelab.training.setup import Setup
from moelab.training.summary import versions

logger = logging.getLogger("moelab")

PLUGINS, VERSIONS = "plugins", "versions"  # of state.json: {package: version}


def tell_choice(choice: Choice) -> None:
    """A line for each checkpoint that is passed over, and for what should be known of the one that is taken."""
    for finding in choice.skipped:
        logger.warning(
            "%s is damaged and passed over: %s; going on from %s", finding.folder, finding.summary(), choice.folder
        )
    for remark in choice.remarks:
        logger.warning(remark)


def check_state(state: Mapping[str, Any], checkpoint: Path, fingerprint: str) -> None:
    """Raises CheckpointError for a state.json that lacks a key or holds another kind of value; UserError where the run
    was trained on another corpus than `fingerprint`'s.
    """
    path = checkpoint / STATE
    if not can_continue(state):
        raise CheckpointError(
            f"{checkpoint}: its {STATE} lacks counters: it was changed, or an earlier version wrote it, which did not "
            "count what the experts served, so its FLOPs can't be continued; start a new run from these weights with "
            "train.init_from"
        )
    record = Record(str(path), state, Reading(CheckpointError, "use an earlier checkpoint, or restore it"))
    for key in ("step", "tokens", "served_weights"):
        record.integer(key, least=0)
    record.number("seconds", least=0.0)
    if len(record.listed("logged", float)) != 3:
        record.refuse("logged", "three numbers")
    if "before_stage" in state and len(record.listed("before_stage", float)) != 3:
        record.refuse("before_stage", "three numbers")
    for key in (PLUGINS, VERSIONS):
        for package in record.record(key, optional=True).values:
            record.record(key).text(package)
    found = record.text("data_fingerprint")
    if found != fingerprint:
        raise UserError(
            f"{checkpoint}: was trained on another corpus (fingerprint {found[:12]}, now {fingerprint[:12]}): the data "
            "or the installed packages changed; restore them, or start anew"
        )


def other_versions(state: Mapping[str, Any], plugins: Mapping[str, str], packages: Mapping[str, str]) -> Iterator[str]:
    """A line for each package whose version is not the one that wrote the checkpoint."""
    for key, now in ((PLUGINS, plugins), (VERSIONS, packages)):
        then = state.get(key) or {}
        for name in sorted(then.keys() | (now.keys() if then else set())):
            if then.get(name) != now.get(name):
                yield (
                    f"{name}: {then.get(name, 'not there')} wrote the checkpoint, {now.get(name, 'not there')} goes on "
                    "from it: the numbers may be others than those of a run that was not interrupted"
                )


def own_choice(setup: Setup) -> Choice | None:
    """The run's own checkpoint that `setup` was built from; None for a run that begins."""
    return setup.start.origin.own if setup.start.origin is not None else None


def find_resume(setup: Setup, choice: Choice | None, run_dir: Path) -> Path | None:
    """The folder of `own_choice`, told; None where a run begins, again or for the first time.

    Raises UserError where it went away since the setup was built.
    """
    if choice is not None:
        if choice.folder is None or not choice.folder.is_dir():
            raise UserError(f"{run_dir}: its checkpoint {choice.folder} went away meanwhile")
        tell_choice(choice)
        return choice.folder
    if setup.config.resume and any(item.name != LOCK for item in run_dir.iterdir()):
        # Killed before its first checkpoint: the run begins again, in the same folder.
        logger.warning("%s has no complete checkpoint yet: starting from step 0", run_dir)
    return None


def as_left_off(setup: Setup, checkpoint: Path) -> Setup:
    """The setup in the stage whose step was the checkpoint's last."""
    step = read_state(checkpoint).get("step")
    return enter(setup, number_at(setup, step - 1 if isinstance(step, int) else 0))


def restore(setup: Setup, checkpoint: Path) -> dict[str, Any]:
    """Fill the setup's model, optimizer and losses; -> what state.json says. Raises UserError where they don't fit."""
    check_same_run(setup, checkpoint)
    state = restore_checkpoint(checkpoint, setup.model, training_state(setup))
    check_state(state, checkpoint, setup.corpus.fingerprint)
    check_mixture(setup.batches, state, checkpoint)
    setup.step_settings.objective.check(state, checkpoint)
    for line in other_versions(state, setup.registry.versions(), versions()):
        logger.warning(line)
    return state


def replan(setup: Setup, checkpoint: Path, state: Mapping[str, Any]) -> Plan:
    """How long the run is that goes on from `checkpoint`, and a line where that is not what was planned.

    Raises ConfigError where the schedule doesn't say what another train.steps means.
    """
    then = read_run_config(checkpoint).train.steps
    config = setup.config
    known = then if isinstance(then, int) else config.train.steps  # from the environment: it is the same, or refused
    plan = plan_of(config.schedule, known, state, checkpoint)
    changed = plan.changed(config.train.steps, state["step"], checkpoint)
    if changed is not plan:
        logger.warning("%s", changed.changes[-1].sentence())
    return changed


def training_state(setup: Setup) -> TrainingState:
    """What a checkpoint holds beside the model."""
    return TrainingState(setup.optimizer, setup.balance_losses, setup.adapters, setup.step_settings.head)
