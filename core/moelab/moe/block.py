"""One mixture-of-experts layer: route, compute, combine, add the shared expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from moelab.errors import ConfigError
from moelab.moe import promises
from moelab.moe.chunked import InChunks
from moelab.moe.contracts import ExpertBackend, ExpertProblem, Latent, Router, SharedExpert
from moelab.moe.experts import ExpertBank, compute_dtype
from moelab.moe.layout import ExpertLayout
from moelab.moe.on_input import weigh_inputs
from moelab.moe.routing import LayerRecord, Routing, TokenInfo
from moelab.plugin_faults import PluginPart


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
        latent: Latent | None = None,
        chunk: int | None = None,
        parts: Mapping[str, PluginPart] | None = None,
    ) -> None:
        """`latent`: the way to the experts' narrower space and back.

        `parts`: {"router", "backend", "shared_expert": how messages call it}; None: by their classes.
        """
        super().__init__()
        self.layout = layout
        self.layer_id = layer_id
        self.router = router
        self.experts = experts
        self.backend = backend
        self.shared_expert = shared_expert
        self.latent = latent
        self.chunk = chunk
        self.dealt: Callable[[ExpertBackend], ExpertBackend] | None = None  # wraps what computes: experts elsewhere
        # Where parameters lie in pieces they are whole in the forward pass alone: what then makes the bank's (gate_up,
        # down) whole tensors of their own, and whether a loss asks for them, since that takes memory and a gather.
        self.whole_experts: Callable[[ExpertBank], tuple[Tensor, Tensor]] | None = None
        self.shows_experts = False
        self.gathered: Callable[[], AbstractContextManager[None]] = nullcontext  # makes them whole elsewhere too
        self._looked_at: set[bool] = set()  # in training, in evaluation
        built = {"router": router, "backend": backend, "shared_expert": shared_expert}
        named = {key: PluginPart.of(key.replace("_", " "), part, layer_id) for key, part in built.items()}
        self.parts = named | {key: part.at(layer_id) for key, part in (parts or {}).items()}
        self._served: set[tuple[str, torch.dtype, int]] = set()  # kinds of problems that the backend accepted

    def plugin_parts(self) -> list[tuple[PluginPart, object]]:
        """Who to blame for what the parts of this layer raise."""
        built = {"router": self.router, "backend": self.backend, "shared_expert": self.shared_expert}
        return [(self.parts[key], part) for key, part in built.items() if part is not None]

    def forward(self, x: Tensor, info: TokenInfo) -> tuple[Tensor, LayerRecord]:
        """x [T, D] -> y [T, D], LayerRecord. What the parts return is looked at once in training and in evaluation."""
        first = self.training not in self._looked_at and x.device.type != "meta" and not torch.compiler.is_compiling()
        routing = self.router(x, info)
        self._refuse("router", promises.routing_shape(routing, x, self.layout.num_experts))
        if first:
            self._look(routing, x)
        if info.routing_override is not None:
            routing = info.routing_override(self.layer_id, routing, x, info)
            self._refuse("router", promises.routing_shape(routing, x, self.layout.num_experts))
        # On a CPU the number of real assignments is known at no cost; elsewhere placeholders of weight 0 are computed.
        served = routing.compact() if x.device.type == "cpu" else routing
        rows = x if self.latent is None else self.latent.down(x)  # [T, L]
        shown: list[Tensor] = []
        y = self.experts(rows, served, self.computing(shown, whole=self.shows_experts or info.measure))
        if first:
            self._refuse("backend", promises.output(y, rows))
        if self.latent is not None:
            y = self.latent.up(y)
        if routing.bypass is not None:
            y = y + routing.bypass.to(y.dtype)
        shared = None if self.shared_expert is None else self.shared_expert(x)
        if first:
            self._refuse("shared_expert", None if shared is None else promises.output(shared, x))
            self._looked_at.add(self.training)
        return (y if shared is None else y + shared), self._record(routing, info, y, shared, shown)

    def reach(self, inner: ExpertBackend) -> ExpertBackend:
        """A backend with the exchange around it, or within, where the experts lie on several processes."""
        if self.dealt is None:
            return inner
        around = getattr(inner, "around", None)
        return self.dealt(inner) if around is None else around(self.dealt)

    def routed(self, x: Tensor, routing: Routing) -> Tensor:
        """What the experts of this process add for a routing, x [T, D] -> [T, D]; outside of a forward pass."""
        compute = weigh_inputs(self.reach(self.backend))
        if self.latent is None:
            return compute(x, routing, self.experts)
        return self.latent.up(compute(self.latent.down(x), routing, self.experts))

    def computing(self, shown: list[Tensor], *, whole: bool) -> Callable[[Tensor, Routing, ExpertBank], Tensor]:
        """The backend, in chunks where a cap is set, and around both the exchange with other processes.

        It takes the bank from the one who calls it, which may be another's module around ours that changes the weights
        meanwhile (PEFT's). `shown` takes these: where they lie in pieces, made `whole` or none.
        """
        gathered = self.whole_experts

        def showing(x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
            self._check_backend(x, routing, bank)  # first: a backend may build what computes from the answer
            inner = self.backend if self.chunk is None else InChunks(self.backend, self.chunk)
            compute = weigh_inputs(self.reach(inner))
            if gathered is None:
                shown.extend((bank.gate_up, bank.down))
            elif whole:
                shown.extend(gathered(bank))
            return compute(x, routing, bank)

        return showing

    def believe(self) -> None:
        """Don't look at what the parts return: where tensors have no values, or that was done already."""
        self._looked_at = {True, False}

    def _record(
        self, routing: Routing, info: TokenInfo, routed: Tensor, shared: Tensor | None, shown: Sequence[Tensor]
    ) -> LayerRecord:
        counts = routing.counts()
        measured = {"routed_norm": routed, "shared_norm": shared} if info.measure else {}
        weight, in_pieces = getattr(self.router, "weight", None), self.whole_experts is not None
        gate_up, down = shown or (None, None)
        return LayerRecord(
            self.layer_id,
            replace(routing, bypass=None),  # [T, D]: of no use to a loss, and it would live until the backward pass
            counts,
            weight.clone() if in_pieces and weight is not None else weight,
            demand=counts if routing.choices is None else routing.demand(),
            info=info,
            gate_up=gate_up,
            down=down,
            **{name: y.detach().float().norm(dim=-1) for name, y in measured.items() if y is not None},
        )

    def _check_backend(self, x: Tensor, routing: Routing, bank: ExpertBank) -> None:
        """Ask the backend once for each device, dtype and power of two of assignments."""
        held = routing.expert.numel() if self.chunk is None else min(self.chunk, routing.expert.numel())
        kind = (x.device.type, compute_dtype(x), held.bit_length())
        if kind in self._served:
            return
        width = self.layout.moe_intermediate_size
        problem = ExpertProblem(
            self.layout.num_experts, x.shape[-1], width, x.shape[0], held, x.device, compute_dtype(x),
            bank.activation, bank.down_bias is not None,
        )  # fmt: skip
        reason = self.backend.supports(problem)
        self._refuse("backend", promises.support(reason))
        if reason is not None:
            raise ConfigError(f"model.moe.backend, layer {self.layer_id}: '{self.backend.name}' {reason}")
        self._served.add(kind)

    @property
    def computes_every_expert(self) -> bool:
        """Whether its backend does in training: not where the router has nothing that could hear of them."""
        return getattr(self.backend, "computes_every_expert", False) and getattr(self.router, "learns", True)

    @torch.no_grad()  # checkpointing counts what is saved, and the second computation does not look
    def _look(self, routing: Routing, x: Tensor) -> None:
        """The values of the first routing, while waiting for them costs nothing that counts."""
        if self.computes_every_expert:
            fault = promises.gradient_beyond_choice(routing)
            if fault is not None:
                raise ConfigError(
                    f"model.moe.backend, layer {self.layer_id}: '{self.backend.name}' gives the weights of experts "
                    f"that a token did not take a gradient, and {fault}, or take another backend"
                )
        self._refuse("router", promises.routing_values(routing, x))

    def _refuse(self, part: str, fault: str | None) -> None:
        if fault is not None:
            raise self.parts[part].fault(fault, getattr(self, part))
