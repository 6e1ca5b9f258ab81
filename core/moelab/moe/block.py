"""One mixture-of-experts layer: route, compute, combine, add the shared expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelab.errors import ConfigError
from moelab.moe.contracts import ExpertBackend, Router, SharedExpert
from moelab.moe.experts import ExpertBank
from moelab.moe.layout import ExpertLayout
from moelab.moe.routing import LayerRecord, Routing, TokenInfo


class MoEBlock(nn.Module):
    """x [T, D] -> y [T, D], LayerRecord. All parts are handed in ready-made."""

    def __init__(
        self,
        layout: ExpertLayout,
        layer_id: int,
        router: Router,
        experts: ExpertBank,
        backend: ExpertBackend,
        shared_expert: SharedExpert | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.layer_id = layer_id
        self.router = router
        self.experts = experts
        self.backend = backend
        self.shared_expert = shared_expert

    def forward(self, x: Tensor, info: TokenInfo) -> tuple[Tensor, LayerRecord]:
        routing = self.router(x, info)
        self._check(routing, x)
        y = self.backend(x, routing, self.experts)
        if self.shared_expert is not None:
            y = y + self.shared_expert(x)
        record = LayerRecord(self.layer_id, routing, routing.counts(), getattr(self.router, "weight", None))
        return y, record

    def _check(self, routing: Routing, x: Tensor) -> None:
        """Shapes and dtypes only: nothing here waits for the device."""
        wanted = (x.shape[0], self.layout.num_experts)
        if (routing.num_tokens, routing.num_experts) != wanted:
            raise ConfigError(
                f"layer {self.layer_id}: router {type(self.router).__module__} returned a routing of (tokens, experts) "
                f"({routing.num_tokens}, {routing.num_experts}), not {wanted}"
            )
        if routing.weight.dtype != torch.float32:
            raise ConfigError(
                f"layer {self.layer_id}: router {type(self.router).__module__} returned weights in "
                f"{routing.weight.dtype}; they must be float32"
            )
