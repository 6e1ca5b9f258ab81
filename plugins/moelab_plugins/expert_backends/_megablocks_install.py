"""Imports MegaBlocks and stk, with or without MegaBlocks' compiled extension, and says why when it can't.

MegaBlocks 0.10.0 can't be imported without `megablocks_ops`, whose seven integer helpers we don't call: where
it is missing, a stand-in that says so takes its place.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

from moelab.kernels.choice import interpreted

INSTALL = "`make setup-megablocks` installs it"
EXTENSION = "megablocks_ops"
HELPERS = (
    "exclusive_cumsum", "histogram", "inclusive_cumsum", "indices", "replicate_backward", "replicate_forward", "sort",
)  # fmt: skip


@dataclass(frozen=True)
class Kernels:
    """What the backend calls."""

    padded_gather: Any  # (x, indices, bin_ids, bins, padded_bins, top_k) -> [P, D]
    padded_scatter: Any  # (rows, indices, bin_ids, weights, bins, padded_bins, top_k) -> [T, D]
    matrix: Any  # stk.Matrix
    sdd: Any  # (dense, dense, topology) -> sparse
    dsd: Any  # (sparse, dense) -> dense


def missing() -> str | None:
    """What is not installed, or None. Imports nothing."""
    for name in ("triton", "stk", "megablocks"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed; {INSTALL}"
    return None


def load() -> Kernels:
    """The kernels. Raises ImportError when `missing()` would have told why."""
    _stand_in()
    import stk.ops
    from megablocks.backend import kernels
    from megablocks.ops import padded_gather, padded_scatter

    if interpreted():
        # The interpreter has no clock to tune by: one configuration each.
        for kernel in (kernels._padded_copy, kernels._padded_copy_wgrad):
            kernel.configs = kernel.configs[:1]
    return Kernels(padded_gather, padded_scatter, stk.Matrix, stk.ops.sdd, stk.ops.dsd)


def has_extension() -> bool:
    """Whether the compiled helpers are there and load."""
    module = sys.modules.get(EXTENSION)
    if module is None:
        try:
            module = importlib.import_module(EXTENSION)
        except Exception:  # built for another torch, say
            return False
    return not hasattr(module, "moelab_stand_in")


def _stand_in() -> None:
    if EXTENSION in sys.modules or has_extension():
        return
    module = ModuleType(EXTENSION, "Stands in for MegaBlocks' compiled extension.")
    module.moelab_stand_in = True  # type: ignore[attr-defined]
    for name in HELPERS:
        setattr(module, name, _absent)
    sys.modules[EXTENSION] = module


def _absent(*arguments: Any) -> NoReturn:
    raise RuntimeError("megablocks_ops, MegaBlocks' compiled extension, is not installed; moelab works without it")
