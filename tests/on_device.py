"""The device that these tests run on, and what holds there alone. Without a CUDA device they run on the CPU, as a
rehearsal: no line then fails for want of a GPU, and CI walks them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


@contextmanager
def never_waiting() -> Iterator[None]:
    """Raises where the host would wait for the device."""
    if not ON_GPU:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def rehearsed(cases: list[Any]) -> list[Any]:
    """All on a GPU, the first alone in a rehearsal."""
    return cases if ON_GPU else cases[:1]
