"""Attention under a `View` by what is fast on the device: the one place that chooses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moelab.nn.blocked_attention import Look, View, blocked_attention


def masked_attention(
    queries: Sequence[Tensor],
    key: Tensor,
    value: Tensor,
    view: View,
    look: Look | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """queries, each [B, H, S, d], key [B, G, L, d], value [B, G, L, v], sinks [H] -> [B, H, S, v]; `blocked_attention`.

    Blocks alone have weights to show a `look`.
    """
    if look is None and queries[0].device.type == "cuda":
        from moelab.nn import flex_attention  # noqa: PLC0415  (brings torch's compiler with it)

        if flex_attention.serves(queries[0], view, value.shape[-1]):
            out = flex_attention.flexed_attention(queries, key, value, view, sinks)
            if out is not None:
                return out
    return blocked_attention(queries, key, value, view, look, sinks)
