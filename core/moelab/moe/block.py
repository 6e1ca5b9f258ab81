"""One mixture-of-experts layer: route, compute, combine, add the shared expert."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moelab.errors import ConfigError
from moelab.moe.chunked import compute_in_chunks
from moelab.moe.contracts import ExpertBackend, ExpertProblem, Router, SharedExpert
from moelab.moe.experts import ExpertBank, compute_dtype
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
        *,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.layer_id = layer_id
        self.router = router
        self.experts = experts
        self.backend = backend
        self.shared_expert = shared_expert
        self.chunk = chunk
        self.looked_at = False
        self._served: set[tuple[str, torch.dtype, int]] = set()  # kinds of problems that the backend accepted

    def forward(self, x: Tensor, info: TokenInfo) -> tuple[Tensor, LayerRecord]:
        routing = self.router(x, info)
        if info.routing_override is not None:
            routing = info.routing_override(self.layer_id, routing, x, info)
        self._check(routing, x)
        # On a CPU the number of real assignments is known at no cost; elsewhere placeholders of weight 0 are computed.
        served = routing.compact() if x.device.type == "cpu" else routing
        self._check_backend(x, served)
        if self.chunk is None:
            y = self.backend(x, served, self.experts)
        else:
            y = compute_in_chunks(self.backend, x, served, self.experts, self.chunk)
        if routing.bypass is not None:
            y = y + routing.bypass.to(y.dtype)
        if self.shared_expert is None:
            return y, self._record(routing, info, y, None)
        shared = self.shared_expert(x)
        return y + shared, self._record(routing, info, y, shared)

    def _record(self, routing: Routing, info: TokenInfo, routed: Tensor, shared: Tensor | None) -> LayerRecord:
        counts = routing.counts()
        measured = {"routed_norm": routed, "shared_norm": shared} if info.measure else {}
        return LayerRecord(
            self.layer_id,
            replace(routing, bypass=None),  # [T, D]: of no use to a loss, and it would live until the backward pass
            counts,
            getattr(self.router, "weight", None),
            demand=counts if routing.choices is None else routing.demand(),
            info=info,
            gate_up=self.experts.gate_up,
            down=self.experts.down,
            **{name: y.detach().float().norm(dim=-1) for name, y in measured.items() if y is not None},
        )

    def _check(self, routing: Routing, x: Tensor) -> None:
        """Shapes and dtypes only: nothing here waits for the device, but for one look at the first call's values."""
        wanted = (x.shape[0], self.layout.num_experts)
        if (routing.num_tokens, routing.num_experts) != wanted:
            raise self._fault(
                f"returned a routing of (tokens, experts) ({routing.num_tokens}, {routing.num_experts}), not {wanted}"
            )
        if not routing.token.shape == routing.expert.shape == routing.weight.shape or routing.weight.ndim != 1:
            raise self._fault(
                "returned token, expert and weight of shapes "
                f"{[tuple(t.shape) for t in (routing.token, routing.expert, routing.weight)]}; each must be [N]"
            )
        if routing.weight.dtype not in (torch.float32, torch.float64):
            raise self._fault(f"returned weights in {routing.weight.dtype}; they must be float32")
        for name, scores in (("scores", routing.scores), ("logits", routing.logits)):
            if scores is not None and (scores.ndim != 2 or scores.shape[0] != x.shape[0]):
                raise self._fault(f"returned {name} of shape {tuple(scores.shape)}; they must be [{x.shape[0]}, E]")
        if not self.looked_at and x.device.type != "meta" and not torch.compiler.is_compiling():
            self._look(routing, x)

    def _check_backend(self, x: Tensor, routing: Routing) -> None:
        """Ask the backend once for each device, dtype and power of two of assignments."""
        held = routing.expert.numel() if self.chunk is None else min(self.chunk, routing.expert.numel())
        kind = (x.device.type, compute_dtype(x), held.bit_length())
        if kind in self._served:
            return
        width = self.layout.moe_intermediate_size
        problem = ExpertProblem(
            self.layout.num_experts, x.shape[-1], width, x.shape[0], held, x.device, compute_dtype(x)
        )
        reason = self.backend.supports(problem)
        if reason is not None:
            raise ConfigError(f"model.moe.backend, layer {self.layer_id}: '{self.backend.name}' {reason}")
        self._served.add(kind)

    @torch.no_grad()  # checkpointing counts what is saved, and the second computation does not look
    def _look(self, routing: Routing, x: Tensor) -> None:
        """Once in a model's life: the values of the first routing, while waiting for them costs nothing that counts."""
        self.looked_at = True
        if routing.expert.numel() == 0:
            return
        if not 0 <= int(routing.expert.min()) <= int(routing.expert.max()) < self.layout.num_experts:
            raise self._fault(f"chose an expert outside 0 .. {self.layout.num_experts - 1}")
        if not 0 <= int(routing.token.min()) <= int(routing.token.max()) < x.shape[0]:
            raise self._fault(f"routed a token outside 0 .. {x.shape[0] - 1}")
        if not bool(torch.isfinite(routing.weight).all()) and bool(torch.isfinite(x).all()):
            raise self._fault("returned weights that are NaN or Inf for a finite input")

    def _fault(self, what: str) -> ConfigError:
        return ConfigError(
            f"model.moe.router, layer {self.layer_id}: {type(self.router).__name__} of {type(self.router).__module__} "
            f"{what}"
        )
