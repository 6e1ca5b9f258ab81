"""What the machine holds, memory and disk, and what of a run would fit into it: asked when one of them ran out."""

from __future__ import annotations

import contextlib
import logging
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from moelab.config.run import RunConfig
from moelab.errors import CheckpointError
from moelab.nn.room import memory_of
from moelab.planning.memory import predict
from moelab.planning.of_run import problem_of
from moelab.registry import Registry
from moelab.shortage import MEMORY, Shortage, size
from moelab.training.precision import choose_precision

logger = logging.getLogger("moelab")
ROOM = 0.9  # of the memory that is there: the prediction is not exact, and others use it too


def told(found: Shortage, config: RunConfig, registry: Registry) -> str:
    """One line: what ran out, what was asked for, what the run takes and what would fit."""
    if found.of != MEMORY:
        return f"{found}"
    advice = "lower train.micro_batch_size, or set train.activation_checkpointing=1"
    with contextlib.suppress(Exception):  # what is told of a failure must not fail
        advice = fitting(config, registry) or advice
    return f"{found}; {advice}"


def fitting(config: RunConfig, registry: Registry) -> str | None:
    """What the run takes by the planner, what is there, and the largest micro-batch that would fit."""
    train = config.train
    device = choose_precision(train).device
    there = memory_there(device)
    if there is None:
        return None
    micro = train.micro_batch_size or train.batch_size // config.parallel.world

    def peak(sequences: int, checkpointing: bool) -> int:
        problem = replace(
            problem_of(config, device.type), sequences=sequences, micro_batches=1, checkpointing=int(checkpointing)
        )
        return predict(config.model, problem, registry).memory.peak

    kept = bool(train.activation_checkpointing)
    now = peak(micro, kept)
    words = f"micro-batches of {micro} x {train.sequence_length} tokens take about {size(now)}, {size(there)} are there"
    if now <= ROOM * there:
        return f"{words}: something else asked for more, such as other processes, a plugin or evaluation.batch_size"
    for checkpointing in {kept: None, True: None}:  # first as it is
        also = "" if checkpointing is kept else " with train.activation_checkpointing=1"
        for smaller in (n for n in range(micro, 0, -1) if train.batch_size % n == 0 and (n < micro or also)):
            needs = peak(smaller, checkpointing)
            if needs <= ROOM * there:
                return f"{words}: train.micro_batch_size={smaller}{also} would fit ({size(needs)})"
    least = size(peak(1, True))
    return f"{words}; one sequence with train.activation_checkpointing=1 takes {least}: a smaller model would fit"


def memory_there(device: torch.device) -> int | None:
    """Bytes that this process may have in all; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    virtual, resident = _line("/proc/self/status", "VmSize") or 0, _line("/proc/self/status", "VmRSS") or 0
    available = _line("/proc/meminfo", "MemAvailable")
    bounds = [memory_of(device), None if available is None else available + resident]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        bounds.append(limit - max(0, virtual - resident))  # what is mapped and not used counts too
    return max(0, min((bound for bound in bounds if bound is not None), default=0)) or None


def check_disk(folder: Path, sizes: dict[str, int], then: str = "go on with --resume") -> None:
    """Raise CheckpointError before files of these sizes are written to `folder` in vain; `then`: what room helps to."""
    needed, free = sum(sizes.values()), shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise CheckpointError(
            f"{folder}: can't be written: it takes {size(needed)}, and {size(free)} are free on that disk; free some "
            f"space and {then}"
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    name = max(sizes, key=lambda name: sizes[name])
    if limit != resource.RLIM_INFINITY and sizes[name] > limit:
        raise CheckpointError(
            f"{folder / name}: can't be written: it takes {size(sizes[name])}, and a file may not grow beyond "
            f"{size(limit)}; raise the limit (ulimit -f) and {then}"
        )


def warn_of_disk(folder: Path, model: nn.Module, keep: int, state: int, adapters: nn.Module | None = None) -> None:
    """One line before a run whose checkpoints won't fit; the oldest is removed after the newest is written.

    state: bytes of the optimizer's in each.
    """
    each = state + sum(p.nbytes for p in model.parameters())
    each += sum(tensor.nbytes for tensor in adapters.state_dict().values()) if adapters is not None else 0
    count, free = (keep or 1) + 1, shutil.disk_usage(_existing(folder)).free
    if each * count > free:
        logger.warning(
            "%s: %d checkpoints of %s won't fit into the %s that are free on that disk; free some space, or set "
            "train.keep_checkpoints=1",
            folder, count, size(each), size(free),
        )  # fmt: skip


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _line(file: str, key: str) -> int | None:
    """Bytes of a line "key:  1234 kB"."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
