"""A package that happens to be installed: its `moelab` entry point imports torch to offer a router nobody asks for.

On the path as it lies here, `heavy_stranger-1.0.dist-info` beside it: `make test-elsewhere` runs all tests with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import moelab


@dataclass
class Options:
    pass


class Alike(torch.nn.Module):
    """All tokens to the first experts."""

    def __init__(self, options: Options, context: moelab.MoEContext) -> None:
        super().__init__()
        self.top_k, self.num_experts = context.num_experts_per_tok, context.num_experts

    def forward(self, x: torch.Tensor, info: moelab.TokenInfo) -> moelab.Routing:
        """x [T, D] -> K experts a token, each with weight 1 / K."""
        expert = torch.arange(self.top_k, device=x.device).expand(len(x), -1)
        weight = torch.full(expert.shape, 1 / self.top_k, device=x.device)
        return moelab.Routing.from_topk(expert, weight, self.num_experts, token_mask=info.mask)


@moelab.hookimpl
def moelab_routers() -> list[moelab.Component[moelab.MoEContext, moelab.Router]]:
    return [moelab.component("alike", Options, Alike)]
