"""SwiGLU feed-forward (Shazeer 2020): the dense layer, and the body of a shared expert."""

from __future__ import annotations

from torch import Tensor, nn

from moelab.nn.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
