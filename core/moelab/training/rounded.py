"""AdamW on numbers of 16 bits: a step is computed in fp32 and rounded at random, up as often as the number is near.

A bf16 number near 1 moves by 2^-8 or not at all, and a learning rate of 1e-4 asks for less: rounded to the nearest, it
would stand still. Rounded up with the probability that is its distance from the lower neighbour, in units of the
distance of both, it is expected to be itself. Source: Gupta, Agrawal, Gopalakrishnan & Narayanan 2015, "Deep Learning
with Limited Numerical Precision", section 3 (for fixed point; not opened here). Ours: bf16, and the moments too.

Noise is keyed by the step's seed and the parameter's name, so a run that goes on draws what it would have drawn, and a
frozen neighbour changes nothing. One draw serves a number and its two moments: each alone is unbiased.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from moelab.seeds import derive_seed

PIECE = 1 << 20  # numbers of a CPU's piece: what is widened for a moment stays in its cache
LANES = 4  # of 16 bits in 64
UPPER = 1 if sys.byteorder == "little" else 0  # where the upper half of a 32-bit number lies
HALF = 1 << 15


class RoundedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's step, whose parameters, moments or both are bf16; the arithmetic is its own, on fp32 copies.

    Groups hold (name, parameter) pairs. `moments`: their dtype. What is fp32 gets AdamW's very bits.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        moments: torch.dtype,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Every parameter that has a gradient. The seed of its noise is torch's, which each training step sets."""
        assert closure is None, "a training step has its gradients already"
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is not None:
                    self._step(group, name, parameter)

    def _step(self, group: dict[str, Any], name: str, parameter: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, dtype=self.moments, memory_format=torch.contiguous_format)
        assert parameter.grad is not None
        kept = [tensor.view(-1) for tensor in (parameter.data, state["exp_avg"], state["exp_avg_sq"])]
        gradient = parameter.grad.reshape(-1)
        noise = torch.Generator(device=parameter.device).manual_seed(
            derive_seed(torch.initial_seed(), "rounding", name)
        )
        size = PIECE if parameter.device.type == "cpu" else max(parameter.numel(), 1)
        for begin in range(0, parameter.numel(), size):
            pieces = [tensor[begin : begin + size] for tensor in kept]
            wide = [piece.float() for piece in pieces]  # of an fp32 one itself
            self._update(group, state["step"].clone(), wide, gradient[begin : begin + size].float())
            round_at_random([pair for pair in zip(pieces, wide, strict=True) if pair[0].dtype != torch.float32], noise)
        state["step"] += 1

    def _update(self, group: dict[str, Any], step: Tensor, wide: list[Tensor], gradient: Tensor) -> None:
        weight, first, second = wide
        beta1, beta2 = group["betas"]
        adamw(
            [weight], [gradient], [first], [second], [], [step], fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip


def round_at_random(pairs: list[tuple[Tensor, Tensor]], noise: torch.Generator) -> None:
    """Set each bf16 tensor [n] to its fp32 one [n], which is used up; all get one draw. What is no number stays none.

    The upper half of an fp32 number is a bf16 one, and the lower half is how far the next one is: a uniform number of
    16 bits added to it carries over with just that probability, away from 0.
    """
    if not pairs:
        return
    count, device = pairs[0][1].numel(), pairs[0][1].device
    drawn = torch.empty(-(-count // LANES), dtype=torch.int64, device=device).random_(-(2**63), None, generator=noise)
    uniform = drawn.view(torch.int16)[:count].to(torch.int32).add_(HALF)  # 0 .. 2^16 - 1
    for narrow, wide in pairs:
        wide.view(torch.int32).add_(uniform)
        narrow.view(torch.int16).copy_(wide.view(torch.int16)[UPPER::2])
