"""Whether a model can fit into the machine at all, asked of its shapes before anything is allocated.

Compared with all the memory there is, not with what is free: what is too large for an idle machine is refused at once,
the rest is the allocator's to say.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from moelab.errors import ConfigError
from moelab.nn.transformer import Transformer

MOMENTS = 2  # AdamW's, of each parameter
_CGROUP = Path("/sys/fs/cgroup/memory.max")  # kernel.org, Documentation/admin-guide/cgroup-v2.rst, "Memory Interface"


def check_room(
    model: Transformer,
    device: torch.device | str,
    state: int | None = None,
    *,
    shard: int = 1,
    beside: int = 1,
) -> None:
    """`model` on the meta device. Raises ConfigError where its parameters alone exceed all of the memory.

    state: it is trained, so gradients lie beside them, and so many bytes that the optimizer holds; shard: processes
    that share them out; beside: those of them on this machine, which share a CPU's memory.
    """
    stored = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in stored)
    device = torch.device(device)
    there = memory_of(device)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    asked = weights if state is None else 2 * weights + state
    held = asked / shard * (beside if device.type == "cpu" else 1)
    if there is not None and held > there:
        more = f", with gradients and moments {_bytes(asked)}" if state is not None else ""
        more += f", {_bytes(int(held))} of it here" if shard > 1 else ""
        raise ConfigError(
            f"model: its {numbers:,} parameters take {_bytes(weights)}{more}, and {device} has {_bytes(there)} in all; "
            "give it fewer layers or experts, or smaller ones (`moelab explain` counts them)"
        )


def memory_of(device: torch.device) -> int | None:
    """Bytes of a device in all; of the CPU as much as this process may have. None where nothing says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if device.type != "cpu":
        return None
    limits = [resource.getrlimit(resource.RLIMIT_AS)[0], _physical(), _of_group()]
    known = [limit for limit in limits if limit is not None and limit >= 0]  # RLIM_INFINITY is -1
    return min(known, default=None)


def _physical() -> int | None:
    """With what can be swapped out, where the system says."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return sum(int(lines[key].split()[0]) << 10 for key in ("MemTotal", "SwapTotal"))
    except (OSError, ValueError, KeyError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _of_group() -> int | None:
    """Of the container."""
    try:
        text = _CGROUP.read_text(encoding="ascii").strip()
        return int(text) if text.isdecimal() else None
    except (OSError, ValueError):
        return None


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
