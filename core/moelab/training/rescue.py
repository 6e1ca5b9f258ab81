"""What becomes of a run that can't go on: its last good state is saved, and one line says what ended it."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from moelab.config.run import RunConfig
from moelab.errors import CheckpointError, RunFailure, UserError
from moelab.parallel.process_group import loss, peer_is_gone
from moelab.parallel.ranks import ALONE, Ranks
from moelab.plugin_faults import quoted, strangers_fault
from moelab.registry import Registry
from moelab.shortage import shortage
from moelab.training.failure import NotFinite, bad_parameter
from moelab.training.limits import told

logger = logging.getLogger("moelab")


@dataclass(frozen=True)
class State:
    """Where a run ended."""

    step: int  # steps done
    whole: bool  # False in the middle of an update, where model, optimizer and plugins' state are of neither step


def save_what_is_good(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    save: Callable[[], None],
    error: BaseException,
    state: State,
    ranks: Ranks = ALONE,
) -> None:
    """Save what a run that ended with `error` leaves, if it is the state of a step; says so, or why not.

    What goes wrong with that is told and not raised: the reason why the run ended is the one to be raised.
    """
    if isinstance(error, CheckpointError):  # it was this very state that could not be saved
        return
    step = state.step
    bad = ranks.first(bad_parameter(model)) if state.whole else "an update that was under way"
    if bad is not None:
        logger.warning("the state after step %d is not saved, because of %s; earlier checkpoints stand", step, bad)
        return
    optimizer.zero_grad(set_to_none=True)  # room for what saving takes
    try:
        save()
    except Exception as problem:  # a full disk, say
        logger.warning("the state after step %d can't be saved either: %s", step, quoted(problem))
    else:
        again = "a run with another config starts from it by train.init_from"  # the same one ends the same way
        how = again if isinstance(error, NotFinite) else "--resume goes on from it"
        logger.warning("the state after step %d is saved; %s", step, how)


def ending(
    error: BaseException, config: RunConfig, registry: Registry, step: int, ranks: Ranks = ALONE
) -> BaseException:
    """`error`, or what tells it in one line: what ran out, whose plugin raised it, or which other process ended.

    An error of this rank alone is left for the main one, which hears of it by its end.
    """
    if isinstance(error, Exception) and peer_is_gone(error):
        failure = loss(ranks, f"step {step}")
        failure.__cause__ = error
        return failure
    told = _told(error, config, registry, step)
    ranks.leave(told)
    if isinstance(told, UserError | RunFailure):
        told.left_to_main = ranks.size > 1
    return told


def _told(error: BaseException, config: RunConfig, registry: Registry, step: int) -> BaseException:
    if not isinstance(error, Exception) or isinstance(error, UserError | RunFailure):
        return error
    found = shortage(error)
    if found is not None:
        traceback.clear_frames(error.__traceback__)  # they hold the step's activations
        failure = RunFailure(f"step {step}: {told(found, config, registry)}")
    else:
        fault = strangers_fault(error)
        if fault is None:
            return error  # our own mistake, which keeps its traceback
        failure = RunFailure(f"step {step}: {fault}")
    failure.__cause__ = error
    return failure


@contextmanager
def shortages_told(config: RunConfig, registry: Registry) -> Iterator[None]:
    """Before the first step: memory or disk that runs out is a UserError, as a smaller config would do."""
    try:
        yield
    except (UserError, RunFailure):
        raise
    except Exception as error:
        found = shortage(error)
        if found is None:
            raise
        traceback.clear_frames(error.__traceback__)
        raise UserError(told(found, config, registry)) from error
