"""Whether a tensor is worked on by our kernels. Importing this imports no triton."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # all sums are in fp32


def fused(tensor: Tensor) -> bool:
    """On a CUDA device with triton (which CUDA builds of torch bring), or, for tests, under triton's interpreter.

    While torch.compile looks on, torch's own operations are what it can fuse.
    """
    on_device = tensor.is_cuda or (interpreted() and tensor.device.type == "cpu")
    return on_device and tensor.dtype in DTYPES and _installed() and not torch.compiler.is_compiling()


@functools.cache  # a look at the environment takes as long as a small operation
def interpreted() -> bool:
    """Whether triton runs its kernels in Python, on the CPU. It decides when it is first imported, and so does this."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
