"""Top K of noisy logits: the first sparsely-gated mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moelab import Component, MoEContext, Router, Routing, TokenInfo, component, hookimpl
from moelab.moe.gate import GateOptions, LinearRouter, noise_generator, project


@dataclass
class NoisyTopKOptions(GateOptions):
    noise_epsilon: float = 0.01  # least standard deviation of the noise: the load loss divides by it
    zero_init: bool = True  # both matrices start at zero, so that noise alone decides and loads start balanced

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_init and self.start != "normal":
            raise ValueError(f"start: {self.start} needs zero_init=false: rows of zeros have no direction")
        if self.zero_init and self.gate == "cosine":
            raise ValueError("gate: cosine needs zero_init=false: rows of zeros have no direction")
        if self.noise_epsilon <= 0:
            raise ValueError(f"noise_epsilon must be positive, not {self.noise_epsilon}")


class NoisyTopK(LinearRouter):
    """The K largest of logits plus learned Gaussian noise, softmax over those.

    Formula: H = W x + n * (softplus(W_noise x) + noise_epsilon), n ~ N(0, 1) in training and 0 afterwards;
    w = softmax of the K largest of H.
    Source: Shazeer et al. (1701.06538) eq. 3-5; noise_epsilon as in tensor2tensor.
    Use: with the losses importance and noisy_load at weight 0.1 each, as the paper does.
    Cost: a second [T, D] x [D, E] product.
    """

    row_tensors = (*LinearRouter.row_tensors, "noise_weight")
    equal_rows = "share"
    batch_invariant = False  # noise in training

    def __init__(self, options: NoisyTopKOptions, context: MoEContext) -> None:
        super().__init__(options, context)
        self.options = options
        self.std = context.initializer_range
        self.noise_weight = nn.Parameter(torch.empty_like(self.weight))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Zeros (the paper's), or N(0, initializer_range)."""
        for weight in (self.weight, self.noise_weight):
            drawn = torch.empty(weight.shape).normal_(0.0, self.std, generator=generator)
            weight.copy_(torch.zeros_like(drawn) if self.options.zero_init else drawn)

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> K experts for each token."""
        clean = self.logits(x)
        noisy, extras = clean, {}
        if info.training:
            raw = project(x, self.noise_weight, self.precision.projection_dtype)
            std = nn.functional.softplus(raw) + self.options.noise_epsilon
            draw = torch.empty(clean.shape, dtype=torch.float32, device=x.device)
            draw.normal_(generator=noise_generator(info, self.layer_id, x.device))
            noisy = clean + draw * std
            extras = {"noisy_logits": noisy, "noise_std": std}
        value, expert = noisy.topk(self.top_k, dim=-1)
        weight = self.round_weight(self.score(value, lambda z: z.softmax(-1)))
        routing = Routing.from_topk(
            expert, weight, self.num_experts, scores=clean.softmax(-1), logits=clean, token_mask=info.mask
        )
        # A loss of counts sees the noisy choices, as DeepSpeed's RSample does: noise evens out on its own.
        return replace(routing, extras=extras, balance_top_k=0)

    def qwen2_moe_fields(self) -> str:
        return "its noise matrix has no place there"


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("noisy_topk", NoisyTopKOptions, NoisyTopK)]
