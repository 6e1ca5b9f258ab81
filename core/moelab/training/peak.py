"""The rate that MFU is a share of: the data sheet's on known accelerators, else a measured matmul."""

from __future__ import annotations

import functools
import time

import torch

from moelab.kernels.onednn import onednn_is_wider, prefers_onednn, product
from moelab.training.precision import Precision

# Dense TFLOP/s of bfloat16 (NVIDIA data sheets, without sparsity); float32 runs as TF32 at half of it or less.
ACCELERATORS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
PROBE_SIZE, PROBE_REPEATS = 1024, 5


@functools.cache
def peak_flops(precision: Precision) -> float:
    """FLOP/s that a large matmul reaches in this precision on this device, with the threads that are set."""
    if precision.device.type == "cuda":
        name = torch.cuda.get_device_name(precision.device)
        for model, rate in ACCELERATORS.items():
            if model in name and precision.dtype == torch.bfloat16:
                return rate
    a = torch.ones(PROBE_SIZE, PROBE_SIZE, device=precision.device, dtype=precision.dtype)
    multiply = product if prefers_onednn(a, a) and onednn_is_wider() else torch.mm  # the layers' way
    best = 0.0
    for _ in range(PROBE_REPEATS):
        _wait(precision.device)
        started = time.perf_counter()
        multiply(a, a)
        _wait(precision.device)
        best = max(best, 2 * PROBE_SIZE**3 / (time.perf_counter() - started))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
