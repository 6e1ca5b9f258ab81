"""What the parts of benchmarks/gpu.py share: the device, the sizes, a clock that ends them."""

from __future__ import annotations

import faulthandler
import gc
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from layer import LayerShape
from moelab.kernels.choice import fused
from moelab.moe import activation, dispatch
from report import median

BF16 = torch.bfloat16
QWEN_57B = LayerShape("Qwen2-57B-A14B", 3584, 64, 8, 2560, shared=20480)
TOY = LayerShape("toy", 128, 8, 2, 128, shared=128)


@dataclass(frozen=True)
class Sizes:
    """What is measured: the real thing, or a toy of it that a CPU walks through in seconds."""

    shapes: tuple[tuple[LayerShape, tuple[int, ...]], ...] = (
        (QWEN_57B, (4096, 16384, 32768)),
        (LayerShape("Qwen1.5-MoE-A2.7B", 2048, 60, 4, 1408), (4096, 32768)),
        (LayerShape("OLMoE-1B-7B", 2048, 64, 8, 1024), (4096, 32768)),
    )
    check: tuple[LayerShape, int] = (LayerShape("check", 512, 64, 8, 768), 4096)
    kernels: int = 16384  # tokens
    steps: tuple[tuple[int, int], ...] = ((2, 4096), (4, 4096))  # sequences, positions
    step_experts: int = 24  # of 57B-A14B's 64
    attention: tuple[tuple[int, int], ...] = ((4, 8192),)  # sequences, positions
    probe: int = 8192  # rows and columns of the matmul that is the card's rate
    copied: int = 1 << 30  # bytes of the copy that is its bandwidth
    repeats: int = 5


REHEARSAL = Sizes(((TOY, (256,)),), (TOY, 256), 256, ((1, 64),), 8, ((1, 128),), 256, 1 << 20, 1)


@dataclass
class Bench:
    """A device, what to measure on it, and its two roofs: the rate of a large matmul, the bandwidth of a large copy."""

    device: torch.device
    sizes: Sizes
    rate: float = field(init=False)  # FLOP/s of one large bf16 product
    bandwidth: float = field(init=False)  # bytes/s, read and written

    def __post_init__(self) -> None:
        size = self.sizes.probe
        a = torch.randn(size, size, device=self.device, dtype=BF16)
        self.rate = 2 * size**3 / self.seconds(lambda: a @ a, 10)
        source = torch.zeros(self.sizes.copied, device=self.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        self.bandwidth = 2 * len(source) / self.seconds(lambda: target.copy_(source), 10)

    def seconds(self, call: Callable[[], Any], repeats: int | None = None) -> float:
        """Median of a call, after two to warm up."""
        found = []
        for _ in range((repeats or self.sizes.repeats) + 2):
            self.wait()
            started = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - started)
        return median(found[2:])

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_gb(self) -> float:
        """Since `release`."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0

    def release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


class OutOfTime(BaseException):
    """A part's time is over; no Exception, so that nothing on the way takes it for a fault of its own."""


@contextmanager
def at_most(seconds: float, grace: float) -> Iterator[None]:
    """Raises OutOfTime when they are over; `grace` seconds later the process ends, whatever it waits for in C."""

    def over(signum: int, frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    faulthandler.dump_traceback_later(seconds + grace, exit=True)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))  # 0 would be never
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def choose(ours: bool) -> None:
    """From here on moelab.kernels, or torch's own passes in their place; a side says which when its turn begins."""
    dispatch.fused = activation.fused = fused if ours else (lambda tensor: False)
