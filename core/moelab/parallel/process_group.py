"""Joining the other processes that torchrun started, and what fails on one of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from moelab import launcher
from moelab.config.run import ParallelConfig
from moelab.errors import ConfigError, RunFailure, UserError
from moelab.parallel.mesh import check_world
from moelab.parallel.ranks import ALONE, Ranks
from moelab.parallel.roll import Roll

logger = logging.getLogger("moelab")

# What gloo says, as a plain RuntimeError.
LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")
OF_SEVERAL = ("accumulate", "reshard_after_forward")  # keys that say nothing of one process
OLDEST = (2, 13)  # torch: what is asked of FSDP2 (force_sum_reduction, unused parameters) is not in earlier ones


@contextmanager
def joined(config: ParallelConfig, device: torch.device) -> Iterator[Ranks]:
    """The ranks of this run; alone where there is one process.

    Raises ConfigError where the config's mesh is not of the world's size, and for a torch that is too old; RunFailure,
    or the user's mistake, where another process ends meanwhile.
    """
    config.check()
    check_world(config, launcher.world())
    if config.world == 1:
        idle = [key for key in OF_SEVERAL if getattr(config, key) != getattr(ParallelConfig, key)]
        if idle:
            logger.warning("%s: without effect, since one process runs", ", ".join(f"parallel.{key}" for key in idle))
        yield ALONE
        return
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ConfigError(f"parallel: several processes need torch {needed} or newer, and {torch.__version__} is here")
    begun = not dist.is_initialized()
    roll = _begin(config, device) if begun else None
    group: Any = import_module("moelab.parallel.group")  # a second, which one process saves
    ranks: Ranks = group.Group(device, roll, config=config)
    try:
        yield ranks
        if begun:
            dist.barrier()
    except Exception as error:
        if peer_is_gone(error):
            raise loss(ranks, "before a step or after the last one") from error
        ranks.leave(error)
        raise
    finally:
        if begun:
            dist.destroy_process_group()


def _begin(config: ParallelConfig, device: torch.device) -> Roll:
    """With a store of this attempt's own: after a restart the old processes' addresses stand in the shared one."""
    rank, world = launcher.rank(), launcher.world()
    store = dist.PrefixStore(f"attempt_{launcher.attempt()}", launcher.store(config.timeout))
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return Roll(dist.PrefixStore("roll", store), rank, world)


def loss(ranks: Ranks, when: str) -> UserError | RunFailure:
    """What a rank ends with whose collective failed, since another one ended `when`; with that one's own message."""
    lost = ranks.lost()
    way_on = "the newest checkpoint stands, and --resume goes on from it"
    error = UserError(lost.text) if lost.mistake else RunFailure(f"{when}: {lost.text}; {way_on}")
    error.left_to_main = lost.left_to_main
    return error


def processes_here(world: int) -> int:
    """How many of the processes run on this machine, as torchrun says; where it says nothing, all."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(int(said), world) if said.isdecimal() and world > 1 else world


def peer_is_gone(error: BaseException) -> bool:
    """Whether a collective failed because another process ended, or did not come in time."""
    if not dist.is_available() or not isinstance(error, RuntimeError):  # of which torch's DistErrors are
        return False
    return isinstance(error, dist.DistError) or any(text in str(error) for text in LOST)


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """What a user's mistake ends on one rank ends on all, before any of them goes on; with its own message.

    Nothing inside waits for another rank. The main process tells it; the others raise it too, and are silent.
    """
    error: UserError | RunFailure | None = None
    try:
        yield
    except (UserError, RunFailure) as problem:
        error = problem
    told = ranks.first(None if error is None else str(error))
    if error is None and told is not None:
        error = UserError(told)
    if error is not None:
        error.left_to_main = ranks.size > 1
        raise error
