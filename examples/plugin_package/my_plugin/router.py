"""A router: softmax top-K with a temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import moelab


@dataclass
class Options:
    temperature: float = 1.0  # of the softmax; higher is flatter

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature: must be positive, not {self.temperature}")


class MyRouter(torch.nn.Module):
    """Softmax top-K with a temperature.

    T tokens, D hidden size, E experts, K experts per token.
    """

    def __init__(self, options: Options, context: moelab.MoEContext) -> None:
        super().__init__()
        self.temperature, self.top_k = options.temperature, context.num_experts_per_tok
        self.weight = torch.nn.Parameter(torch.empty(context.num_experts, context.hidden_size))

    def forward(self, x: torch.Tensor, info: moelab.TokenInfo) -> moelab.Routing:
        """x [T, D] -> who goes where, and with what weight."""
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 near-ties choose other experts
            logits = x.float() @ self.weight.float().t() / self.temperature  # [T, E]
        scores = logits.softmax(-1)
        weight, expert = scores.topk(self.top_k)  # [T, K]
        return moelab.Routing.from_topk(
            expert, weight, len(self.weight), scores=scores, logits=logits, token_mask=info.mask
        )


@moelab.hookimpl
def moelab_routers() -> list[moelab.Component]:
    return [moelab.component("my_router", Options, MyRouter)]
