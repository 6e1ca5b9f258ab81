"""A MoE layer for tokens that are generated: what `MoEBlock.forward` adds, without a record.

What a layer consists of is looked up once: for a few tokens looking things up costs as much as computing.
T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moelab.moe.block import MoEBlock
from moelab.moe.experts import ExpertBank
from moelab.moe.few_rows import ExpertTables
from moelab.moe.routing import Routing, TokenInfo
from moelab.nn.linear import hooked


def reads_few_rows(block: MoEBlock) -> bool:
    """Whether its backend hands few tokens over to `moe/few_rows.py`, so that who serves may do so at once."""
    return (
        bool(getattr(block.backend, "hands_over_few_rows", False))
        and type(block.experts) is ExpertBank
        and block.dealt is None
        and block.chunk is None
    )


class ServedBlock:
    """(x [T, D], info, base [T, D]) -> base + y [T, D] and who served whom.

    The parts were looked at when the prompt went through `forward`.
    """

    def __init__(self, block: MoEBlock, tables: ExpertTables | None) -> None:
        """`tables`: of the block's experts; None: there are none."""
        self.layer_id = block.layer_id
        self._block, self._latent, self._tables = block, block.latent, tables
        self._route: Callable[[Tensor, TokenInfo], Routing] = _served(block.router) or block.router
        self._shared, self._onto = block.shared_expert, _served(block.shared_expert)
        self._compacts = block.experts.down.device.type == "cpu"

    def __call__(self, x: Tensor, info: TokenInfo, base: Tensor) -> tuple[Tensor, Routing]:
        routing = self._route(x, info)
        served = routing.compact() if routing.served is not None and self._compacts else routing
        rows = x if self._latent is None else self._latent.down(x)
        if self._tables is not None and self._tables.serve(rows, served):
            y = self._tables.served(rows, served)
        else:
            y = self._block.experts(rows, served, self._block.computing([], whole=False))
        if self._latent is not None:
            y = self._latent.up(y)
        if routing.bypass is not None:
            y = y + routing.bypass.to(y.dtype)
        y = base + y
        if self._onto is not None:
            return self._onto(y, x), routing
        return (y if self._shared is None else y + self._shared(x)), routing


def _served(part: object) -> Callable[..., Any] | None:
    """What a router or shared expert offers for generation; None where its own call must do."""
    offered = getattr(part, "serving", None)
    if offered is None or (isinstance(part, nn.Module) and hooked(part)):
        return None
    served: Callable[..., Any] | None = offered()
    return served
