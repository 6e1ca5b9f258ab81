"""What an attention and a rope scaling promised to be, checked where they are built; the kit asks the same."""

from __future__ import annotations

from typing import Any

from torch import nn

from moelab.plugin_faults import article


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


def _reach(built: Any) -> str | None:
    reach = getattr(built, "reach", "missing")
    if reach is None or (isinstance(reach, int | float) and not isinstance(reach, bool) and reach > 0):
        return None
    said = "has no `reach`" if reach == "missing" else f"has reach {reach!r}"
    return f"{said}; it must be None, or the positions up to which it is right"
