"""What an attention and a rope scaling promised to be, checked where they are built; the kit asks the same."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from moelab.plugin_faults import PluginPart, article


def attention_built(kernel: object, *, sinks: bool = False) -> str | None:
    """Of what an attention component built, for a model with `sinks`: a phrase for `PluginPart.fault`, or None."""
    if not callable(kernel):
        return f"built {article(kernel)}, which can't be called with (query, key, value, inputs)"
    if isinstance(kernel, nn.Module) and next(kernel.parameters(), None) is not None:
        return "has parameters; an attention owns none"
    mode = getattr(kernel, "cache_mode", None)
    if not isinstance(mode, str) or not mode:
        return f"has cache_mode {mode!r}; it must be a text that says what its cached keys are"
    if sinks and getattr(kernel, "serves_sinks", False) is not True:
        return "does not serve model.attention_sinks (no `serves_sinks`); take another attention, or set that to false"
    return _reach(kernel)


def scaling_built(scaling: object) -> str | None:
    """Of what a rope scaling component built; None is plain rotary embedding."""
    if scaling is None:
        return None
    if not callable(scaling):
        return f"built {article(scaling)}, which can't be called with (inv_freq, length) and is not None"
    if not isinstance(getattr(scaling, "length_matters", None), bool):
        return "has no `length_matters`; it must be True or False: whether the frequencies change with the length"
    return _reach(scaling)


def kernel_part(kernel: object, layer_id: int) -> PluginPart:
    """Whom to blame for what the attention of a layer does."""
    return replace(PluginPart.of("attention", kernel, layer_id), where="model.attention")


def attended(out: object, query: Tensor, width: int) -> str | None:
    """Of what an attention returned for query [B, H, S, d] and values of `width`; a look at sizes, at no cost."""
    wanted = (*query.shape[:-1], width)
    if not isinstance(out, Tensor):
        return f"returned {article(out)}; it must return a tensor {wanted}: heads, then positions"
    if out.shape != wanted or not out.is_floating_point():
        kind = str(out.dtype).removeprefix("torch.")
        return f"returned {tuple(out.shape)} {kind}; it must be {wanted}, heads and then positions, {query.dtype}"
    return None


def scaled(found: object, inv_freq: Tensor) -> str | None:
    """Of what a rope scaling returned for inv_freq [d / 2], on the CPU."""
    rule = f"it must return (frequencies [{len(inv_freq)}], factor on cos and sin)"
    if not isinstance(found, tuple) or len(found) != 2:
        return f"returned {article(found)}; {rule}"
    frequencies, factor = found
    if not isinstance(frequencies, Tensor) or frequencies.shape != inv_freq.shape:
        return f"returned {article(frequencies)} {tuple(getattr(frequencies, 'shape', ()))} of frequencies; {rule}"
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        return f"returned {article(factor)} as the factor; {rule}"
    if not (bool(frequencies.isfinite().all()) and math.isfinite(factor) and factor > 0):
        return f"returned frequencies up to {float(frequencies.max()):g} and factor {factor:g}; all must be finite"
    return None


def _reach(built: Any) -> str | None:
    reach = getattr(built, "reach", "missing")
    if reach is None or (isinstance(reach, int | float) and not isinstance(reach, bool) and reach > 0):
        return None
    said = "has no `reach`" if reach == "missing" else f"has reach {reach!r}"
    return f"{said}; it must be None, or the positions up to which it is right"
