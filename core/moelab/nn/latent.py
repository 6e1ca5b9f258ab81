"""Latent experts: the routed experts of a layer read and write a narrower space, one projection there and one back.

LatentMoE (2601.18089, not opened; transformers' nemotron_h and Megatron's `moe_latent_size` compute it so), with Kimi
K3's norm before the way back (2607.24653, eq. "latentmoe" of 2.3). Router and shared experts keep the full width.
"""

from __future__ import annotations

from torch import Tensor, nn

from moelab.nn.linear import Linear
from moelab.nn.norm import RMSNorm


class LatentProjection(nn.Module):
    """y = up(norm(experts(down x))). D hidden size, L latent size.

    Nemotron-H has biases here where its `mlp_bias` is true, which no published one is; Kimi K3 has none, nor have we.
    """

    def __init__(self, hidden_size: int, latent_size: int, norm_eps: float | None = None) -> None:
        """`norm_eps`: of the RMSNorm over the experts' sum; None: no norm."""
        super().__init__()
        self.down_proj = Linear(hidden_size, latent_size, bias=False)
        self.norm = None if norm_eps is None else RMSNorm(latent_size, norm_eps)
        self.up_proj = Linear(latent_size, hidden_size, bias=False)

    def down(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, L]."""
        latent: Tensor = self.down_proj(x)
        return latent

    def up(self, y: Tensor) -> Tensor:
        """The weighted sum of a token's experts, y [T, L] -> [T, D]."""
        out: Tensor = self.up_proj(y if self.norm is None else self.norm(y))
        return out
