"""Where the matmuls run and in which dtype, and in which the matrices are kept. Routers stay in fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from moelab.config.run import TrainConfig
from moelab.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    """A device and a matmul dtype."""

    device: torch.device
    dtype: torch.dtype
    kept: torch.dtype = torch.float32  # of matrices between steps: train.parameters_dtype

    def autocast(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def exact(self) -> AbstractContextManager[object]:
        """For products as exact as the parameters are: fp32 ones, unless they are narrower."""
        return nullcontext() if self.kept == torch.float32 else self.autocast()


def choose_precision(train: TrainConfig) -> Precision:
    """The config's device and dtype. Raises ConfigError for a device that is not here."""
    available = torch.cuda.is_available()
    name = train.device if train.device != "auto" else "cuda" if available else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"train.device: '{name}' is no torch device; write auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not available:
        raise ConfigError(f"train.device: torch sees no CUDA device for '{name}'; use cpu or auto")
    return Precision(device, getattr(torch, train.dtype), getattr(torch, train.parameters_dtype))


def set_threads(train: TrainConfig) -> int:
    """Fix the number of CPU threads, which also fixes the bits; -> that number.

    torch's own choice is one a core, or OMP_NUM_THREADS.
    """
    threads = train.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    return threads
