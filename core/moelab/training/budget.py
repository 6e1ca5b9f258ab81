"""`train.memory_budget` in a run: chosen once, kept when it is resumed, and held against what a step then takes."""

from __future__ import annotations

import logging

from moelab.checkpoint import read_run_config
from moelab.config.run import RunConfig
from moelab.config.scalars import bytes_of
from moelab.planning.budget import choose, write
from moelab.planning.memory import MemoryPlan
from moelab.registry import Registry
from moelab.shortage import size
from moelab.training.start import Start

logger = logging.getLogger("moelab")


def settle_budget(config: RunConfig, registry: Registry, device: str, start: Start) -> MemoryPlan | None:
    """Write into a resolved config, in place, how a step is to be computed; None: there is no budget, or nothing to do.

    A run that goes on takes what its checkpoint says, since another choice would end in other bits. Raises ConfigError
    where nothing fits.
    """
    budget = config.train.memory_budget
    if budget is None:
        return None
    origin = start.origin
    begun = origin is not None and origin.own is not None and origin.own.folder is not None
    if origin is not None and begun and keep_choice(config, read_run_config(origin.folder)):
        return None
    choice = choose(config, registry, device)
    logger.warning("%s", choice.sentence(config))
    choice.write(config)
    return choice.memory


def keep_choice(config: RunConfig, then: RunConfig) -> bool:
    """Write into a config, in place, what a run chose that began under the same budget; -> whether there is one."""
    if config.train.memory_budget is None or config.train.memory_budget != then.train.memory_budget:
        return False
    sizes = [stage.micro_batch_size for stage in then.stages] or [then.train.micro_batch_size]
    write(config, sizes, then.train.activation_checkpointing, then.train.recompute_logits)
    return True


def tell_measured(config: RunConfig, plan: MemoryPlan | None, gigabytes: float, step: int, told: bool | None) -> bool:
    """A line about the memory that the process took up to `step`, and a warning once it is more than it may be.

    `told`, and returned: whether what was told was too much; None: nothing was.
    """
    budget = config.train.memory_budget
    allowed, measured = bytes_of(budget) or 0, round(1e9 * gigabytes)
    beyond = budget is not None and measured > allowed
    planned = f", {size(plan.peak)} as planned" if plan is not None else ""
    if budget is None or told or told == beyond:
        return bool(told)
    if not beyond:
        logger.info("train.memory_budget %s: %s taken up to step %d%s", budget, size(measured), step, planned)
    else:
        logger.warning(
            "train.memory_budget %s: %s taken up to step %d%s; to stay below, begin a new run with a smaller budget or "
            "micro-batch",
            budget, size(measured), step, planned,
        )  # fmt: skip
    return beyond
