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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from moelab.nn.optimizing import Kept, each, noise_of
from moelab.nn.pieces import held

# (first number of the piece, its weights before the step, those after it, first and second moments) [n] fp32; the
# weights after it may be changed in place
Then = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
PIECE = 1 << 20  # numbers of a CPU's piece: what is widened for a moment stays in its cache
LANES = 4  # of 16 bits in 64
UPPER = 1 if sys.byteorder == "little" else 0  # where the upper half of a 32-bit number lies
HALF = 1 << 15


class AdamWStep:
    """torch.optim.AdamW's step of one parameter, whose weight, moments or both may be bf16: its own, on fp32 copies.

    What is fp32 gets AdamW's very bits. Optimizers that leave parameters to AdamW, or go on from its step, call it.
    `moments`: their dtype. `seed`: of the rounding; None: torch's own, which each training step sets.
    """

    def __init__(self, moments: torch.dtype, seed: int | None = None) -> None:
        self.moments, self.seed = moments, seed

    @property
    def kept(self) -> dict[str, torch.dtype]:
        """Beside the step, which is a scalar."""
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), self.moments)

    def begin(self, state: dict[str, Any], parameter: Tensor) -> None:
        """Zero moments, laid as the parameter is."""
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for key in self.kept:
            state[key] = torch.zeros_like(parameter, dtype=self.moments, memory_format=torch.contiguous_format)

    def __call__(
        self,
        group: Mapping[str, Any],
        name: str,
        parameter: Tensor,
        state: dict[str, Any],
        size: int | None = None,
        then: Then | None = None,
    ) -> None:
        """Step a parameter of the model's by its gradient. `size`: numbers of a piece; None: what fits a cache.

        `then`: called with each piece in fp32, between the step and the rounding.
        """
        if "step" not in state:
            self.begin(state, parameter)
        assert parameter.grad is not None
        kept = [held(tensor.detach()).view(-1) for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])]
        gradient = held(parameter.grad).reshape(-1)
        noise = noise_of(self.seed, "rounding", name, state["step"], parameter.device)
        if size is None:
            size = PIECE if parameter.device.type == "cpu" else max(kept[0].numel(), 1)
        for begin in range(0, kept[0].numel(), size):
            pieces = [tensor[begin : begin + size] for tensor in kept]
            wide = [piece.float() for piece in pieces]  # of an fp32 one itself
            before = None if then is None else wide[0].clone()
            self._update(group, state["step"].clone(), wide, gradient[begin : begin + size].float())
            if then is not None and before is not None:
                then(begin, before, *wide)
            round_at_random([pair for pair in zip(pieces, wide, strict=True) if pair[0].dtype != torch.float32], noise)
        state["step"] += 1

    def _update(self, group: Mapping[str, Any], step: Tensor, wide: list[Tensor], gradient: Tensor) -> None:
        weight, first, second = wide
        beta1, beta2 = group["betas"]
        adamw(
            [weight], [gradient], [first], [second], [], [step], fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW of parameters, moments or both that are bf16, one after the other.

    Groups hold (name, parameter) pairs. `moments`: their dtype.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        moments: torch.dtype,
        seed: int | None = None,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._adamw = AdamWStep(moments, seed)

    def kept(self, group: Mapping[str, Any]) -> Kept:
        return Kept(self._adamw.kept)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Every parameter that has a gradient."""
        assert closure is None, "a training step has its gradients already"
        for group, name, parameter in each(self):
            if parameter.grad is not None:
                self._adamw(group, name, parameter, self.state[parameter])


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
