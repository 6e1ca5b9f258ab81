"""The problem that a run poses to each of its devices."""

from __future__ import annotations

import torch

from moelab.config.run import RunConfig
from moelab.errors import ConfigError
from moelab.planning.traffic import Problem


def problem_of(run: RunConfig, device: str) -> Problem:
    """What a step of `run` asks of each "cpu" or "cuda". Raises ConfigError for a batch that can't be dealt out."""
    train, world = run.train, run.parallel.world
    sequences = train.micro_batch_size or train.batch_size // world
    if not sequences or train.batch_size % (sequences * world):
        raise ConfigError(f"train.batch_size: {train.batch_size} is not a multiple of {sequences} x {world} devices")
    return Problem(
        sequences=sequences,
        sequence_length=train.sequence_length,
        dtype=getattr(torch, train.dtype),
        device=device,
        parallel=run.parallel,
        micro_batches=train.batch_size // (sequences * world),
        checkpointing=train.activation_checkpointing,
        kept=getattr(torch, train.parameters_dtype),
        moments=getattr(torch, run.optimizer.moments_dtype),
        adapters=train.adapters,
        frozen=train.freeze,
        compiled=train.compile,
        saves_behind=world > 1 if train.save_in_background is None else train.save_in_background,
        algorithm=run.optimizer.algorithm,
        recompute_logits=train.recompute_logits,
    )
