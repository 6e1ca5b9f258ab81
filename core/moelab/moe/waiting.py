"""Where the host may ask a tensor for its values: on a CPU they are there, an accelerator would be waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_free = True


def waiting_is_free(of: Tensor) -> bool:
    """Whether shapes may depend on values here: on a CPU that holds some, outside torch.compile, whose graph breaks."""
    values = of.device.type == "cpu" and not isinstance(of, FakeTensor)
    return _free and values and not torch.compiler.is_compiling()


@contextmanager
def as_on_an_accelerator() -> Iterator[None]:
    """Inside, waiting is free nowhere: a CPU takes the path that an accelerator would, as the conformance kit asks."""
    global _free  # noqa: PLW0603  (a plain flag is what torch.compile can look at)
    before, _free = _free, False
    try:
        yield
    finally:
        _free = before
