"""Where the host may ask a tensor for its values: on a CPU they are there, an accelerator would be waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_free = True


def waiting_is_free(of: Tensor) -> bool:
    """Whether shapes may depend on values here: on a CPU, outside torch.compile, which would break its graph there."""
    return _free and of.device.type == "cpu" and not torch.compiler.is_compiling()


@contextmanager
def as_on_an_accelerator() -> Iterator[None]:
    """Inside, waiting is free nowhere: a CPU takes the path that an accelerator would, as the conformance kit asks."""
    global _free  # noqa: PLW0603  (a plain flag is what torch.compile can look at)
    before, _free = _free, False
    try:
        yield
    finally:
        _free = before
