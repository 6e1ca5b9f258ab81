"""The feed-forward network: the dense layer, and the body of a shared expert."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from moelab.moe.activation import Activation, SwiGLU, activate
from moelab.moe.thin_product import adder, joined_product, reader
from moelab.nn.linear import Linear, hooked


class MLP(nn.Module):
    """down(activation(gate x, up x)); without `gate_proj` where the activation is not gated."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: Activation | None = None, bias: bool = False
    ) -> None:
        """`activation` None: SwiGLU. `bias`: on every matrix."""
        super().__init__()
        self.activation = activation or SwiGLU()
        if self.activation.gated:
            self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def hidden(self, x: Tensor) -> Tensor:
        """The neurons: x [..., D] -> [..., F]."""
        if self.activation.gated:
            gate, up = self.gate_proj, self.up_proj
            plain = type(gate) is Linear and type(up) is Linear  # an adapter's module adds to it
            joined = joined_product(x, gate.weight, up.weight) if plain else None
            if joined is None:
                return self.activation(gate(x), up(x))
            hidden = activate(self.activation, joined.reshape(-1, 2, joined.shape[-1] // 2))
            return hidden if x.dim() == 2 else hidden.view(*x.shape[:-1], -1)
        return self.activation(self.up_proj(x))

    def reading_input(self) -> tuple[Tensor, ...]:
        """The matrices that read x itself, for who makes one product of them; none where somebody looks between."""
        if not self.activation.gated or type(self).hidden is not MLP.hidden:
            return ()
        parts = (self.gate_proj, self.up_proj)
        plain = all(type(part) is Linear and part.bias is None and not hooked(part) for part in parts)
        return tuple(part.weight for part in parts) if plain else ()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        out: Tensor = self.down_proj(self.hidden(x))
        return out

    def serving(self) -> Callable[[Tensor, Tensor], Tensor]:
        """(base, x [T, D]) -> base + what x gives, for generation: see `moe.contracts.SharedExpert`."""
        neurons = self.neurons_served() if type(self).forward is MLP.forward else None
        if neurons is None:
            return lambda base, x: base + self(x)
        add, serve = adder(self.down_proj.weight, self.down_proj.bias), neurons
        return lambda base, x: add(base, serve(x))

    def neurons_served(self) -> Callable[[Tensor], Tensor] | None:
        """`hidden` of x [T, D], from copies of its matrices; None where there are none, or somebody looks between."""
        if hooked(self) or type(self.down_proj) is not Linear or hooked(self.down_proj):
            return None
        weights = MLP.reading_input(self)  # of gate and up alone, whatever else a shared expert tells of
        read = reader(*weights) if weights else None
        if read is None:
            return None
        activation, width, both = self.activation, self.up_proj.out_features, read

        def neurons(x: Tensor) -> Tensor:
            joined = both(x)
            return activation(joined.narrow(-1, 0, width), joined.narrow(-1, width, width))

        return neurons
