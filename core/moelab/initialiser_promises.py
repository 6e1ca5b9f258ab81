"""What the initialisers of upcycling promised to be and to return, checked where they are built and called.

Each function answers with a phrase for `PluginPart.fault`, or None. The conformance kit asks the same functions.
F neurons of the dense layer, n neurons of an expert, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from moelab.initialisers import MATRICES, NO_SOURCE, NeuronPlan
from moelab.plugin_faults import article

# axis -> (methods, numbers) that its initialiser must have
NEEDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "experts": (("plan", "materialise"), ()),
    "shared": (("plan", "materialise", "gate"), ("gain",)),
    "router": (("weight",), ("std",)),
    "scaling": (("factors",), ("share",)),
}


def built(axis: str, part: object) -> str | None:
    """Of what a component of `recipe.AXIS` built."""
    methods, numbers = NEEDS[axis]
    for name in methods:
        if not callable(getattr(part, name, None)):
            return f"built {article(part)} without a method {name}()"
    for name in numbers:
        value = getattr(part, name, None)
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
            return f"has {name} {value!r}; it must be a finite number"
    if getattr(part, "prepare", None) is not None and not callable(part.prepare):  # type: ignore[attr-defined]
        return "has prepare, which can't be called"
    return None


def planned(plan: object, neurons: int, intermediate_size: int, num_sources: int) -> str | None:
    """Of what `plan` returned for n neurons taken from F."""
    if not isinstance(plan, NeuronPlan):
        return f"plan() returned {article(plan)}; it must return a NeuronPlan (moelab.initialisers)"
    source = plan.source
    if not isinstance(source, np.ndarray) or source.shape != (neurons,) or source.dtype.kind not in "iu":
        return f"planned source as {_described(source)}; it must be whole numbers [{neurons}]"
    if neurons and not NO_SOURCE <= int(source.min()) <= int(source.max()) < intermediate_size:
        return (
            f"planned the source {source.min()} .. {source.max()}; the dense neurons are 0 .. {intermediate_size - 1}"
        )
    for matrix in MATRICES:
        redrawn = plan.redrawn.get(matrix) if isinstance(plan.redrawn, Mapping) else None
        if not isinstance(redrawn, np.ndarray) or redrawn.shape != (neurons,) or redrawn.dtype != np.bool_:
            return f"planned redrawn['{matrix}'] as {_described(redrawn)}; it must be bool [{neurons}]"
    if not isinstance(plan.checkpoint, int | np.integer) or not 0 <= plan.checkpoint < num_sources:
        return f"planned the checkpoint {plan.checkpoint!r}; there are {num_sources}"
    return None


def made(
    values: object, shape: Sequence[int], storage: npt.DTypeLike | None = None, *, finite: bool = False
) -> str | None:
    """Of a matrix that an initialiser returned. storage: the dense matrix' own type; finite: look at the values too."""
    if not isinstance(values, np.ndarray) or values.shape != tuple(shape):
        return f"made {_described(values)}; it must be [{', '.join(map(str, shape))}]"
    if values.dtype.kind != "f" and values.dtype != storage:
        return f"made {_described(values)}; it must be float32, or as the dense matrix is stored"
    if finite and values.dtype.kind == "f" and not np.isfinite(values).all():
        return "made values that are NaN or Inf"
    return None


def factors(found: object) -> str | None:
    """Of what `OutputScaling.factors` returned."""
    if not isinstance(found, Mapping):
        return f"factors() returned {article(found)}; it must return {{matrix: factor}}"
    for matrix, factor in found.items():
        if matrix not in MATRICES:
            return f"factors() returned one for {matrix!r}; the matrices are {', '.join(MATRICES)}"
        if not isinstance(factor, int | float | np.number) or not math.isfinite(factor):
            return f"factors() returned {factor!r} for {matrix}; it must be a finite number"
    return None


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else article(value)
