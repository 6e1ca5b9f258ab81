"""Muon: the matrices of hidden layers step by an orthogonal matrix, all else by AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moelab import Component, ConfigError, Kept, OptimizerContext, Trained, component, hookimpl
from moelab.nn.optimizing import Optimizer, each, noise_of
from moelab.nn.pieces import gathered, held, is_piece, own_part
from moelab.training.rounded import AdamWStep, round_at_random

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration (torch.optim.Muon's, Keller Jordan's)
LEAST_NORM = 1e-7  # torch.optim.Muon's eps
MATCHED, ORIGINAL = "match_rms_adamw", "original"
AT_ONCE = 1 << 24  # numbers that are orthogonalised at once: what is widened beside the parameters


@dataclass
class MuonOptions:
    momentum: float = 0.95  # m = momentum * m + (1 - momentum) * gradient
    nesterov: bool = True  # look one step ahead
    ns_steps: int = 5  # of the Newton-Schulz iteration
    # On the rate of a matrix [out, in]: match_rms_adamw, 0.2 sqrt(max(out, in)), with which AdamW's rate and decay
    # serve; original, sqrt(max(1, out / in)).
    adjust_lr_fn: str = MATCHED
    ns_dtype: str = "bfloat16"  # of the iteration: bfloat16, as torch has it, or float32, where 16 bits are not faster

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in 0 .. 1, not {self.momentum}")
        if not 1 <= self.ns_steps < 100:
            raise ValueError(f"ns_steps must be in 1 .. 99, not {self.ns_steps}")
        if self.adjust_lr_fn not in (MATCHED, ORIGINAL):
            raise ValueError(f"adjust_lr_fn must be {MATCHED} or {ORIGINAL}, not '{self.adjust_lr_fn}'")
        if self.ns_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"ns_dtype must be bfloat16 or float32, not '{self.ns_dtype}'")


class Muon(Optimizer):
    """torch.optim.Muon's step for each matrix of a hidden layer, a stack of experts one by one; AdamW's for the rest.

    Formula: m = mu m + (1 - mu) G, U = NS(mu m + (1 - mu) G), W = (1 - lr wd) W - lr 0.2 sqrt(max(out, in)) U; NS is
    five times X = a X + (b X X^T + c (X X^T)^2) X from X = U / |U|, which brings singular values near 1.
    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Moonlight (2502.16982), whose scale
    and decay torch's documentation gives; equal to torch.optim.Muon (2.11+) on a matrix to the bit.
    Use: half of AdamW's state for matrices; fewer steps to a loss, say its authors.
    Cost: fifteen products with matrices a step. An expert's gate and up projection are two matrices, as in Hugging
    Face's layout. Embeddings, head, norms, biases, routers and single rows are AdamW's. Laid over
    processes, a matrix that they share is gathered and orthogonalised by each; experts are where they lie.
    """

    def __init__(self, options: MuonOptions, context: OptimizerContext) -> None:
        matrices = [one for one in context.trained if one.is_hidden_matrix]
        if not matrices:
            raise ConfigError("nothing that is trained is a matrix between hidden layers; take adamw")
        others = [one for one in context.trained if not one.is_hidden_matrix]
        settings = context.settings
        super().__init__(
            [*context.groups(matrices, muon=True), *context.groups(others, muon=False)],
            {"lr": settings.lr, "betas": tuple(settings.betas), "eps": settings.eps, "weight_decay": 0.0},
        )
        self._options, self._seed, self._moments = options, context.seed, context.moments
        self._of = {one.name: one for one in matrices}
        self._adamw = AdamWStep(context.moments, context.seed)

    def kept(self, group: Mapping[str, Any]) -> Kept:
        return Kept({"momentum_buffer": self._moments} if group["muon"] else self._adamw.kept)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Every parameter that has a gradient."""
        assert closure is None, "a training step has its gradients already"
        for group, name, parameter in each(self):
            if parameter.grad is None:
                continue
            if group["muon"]:
                self._step(group, self._of[name], self.state[parameter])
            else:
                self._adamw(group, name, parameter, self.state[parameter])

    def _step(self, group: Mapping[str, Any], one: Trained, state: dict[str, Any]) -> None:
        parameter = one.parameter
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["momentum_buffer"] = torch.zeros_like(
                parameter, dtype=self._moments, memory_format=torch.contiguous_format
            )
        assert parameter.grad is not None
        kept = [held(tensor.detach()) for tensor in (parameter, state["momentum_buffer"])]
        gradient = held(parameter.grad)
        noise = noise_of(self._seed, "rounding", one.name, state["step"], parameter.device)
        rows = kept[0].shape[0]
        # Slices of a stack by the batch; of a matrix all of it, since it is one.
        size = rows if parameter.dim() == 2 else max(1, AT_ONCE // max(1, kept[0][0].numel())) if rows else 1
        for first in range(0, rows, size) if rows or parameter.dim() > 2 else (0,):
            pieces = [tensor[first : first + size] for tensor in kept]
            wide = [piece.float() for piece in pieces]  # of an fp32 one itself
            self._update(group, one, wide, gradient[first : first + size].float())
            pairs = [(n.view(-1), w.view(-1)) for n, w in zip(pieces, wide, strict=True) if n.dtype != torch.float32]
            round_at_random(pairs, noise)
        state["step"] += 1

    def _update(self, group: Mapping[str, Any], one: Trained, wide: list[Tensor], gradient: Tensor) -> None:
        """wide: weight and momentum [e, ..., columns] fp32, changed in place; gradient: the same."""
        weight, buffer = wide
        momentum = self._options.momentum
        buffer.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(buffer, momentum) if self._options.nesterov else buffer
        shared = is_piece(one.parameter) and one.parameter.dim() == 2
        whole = gathered(update, one.parameter) if shared else update
        matrices = one.slices(whole)
        step = orthogonal(matrices, self._options.ns_steps, getattr(torch, self._options.ns_dtype)).reshape(whole.shape)
        out, into = matrices.shape[-2:] if not one.input_first else reversed(matrices.shape[-2:])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        mine = own_part(step, one.parameter) if shared else step
        weight.add_(mine, alpha=-group["lr"] * adjusted(self._options.adjust_lr_fn, out, into))


def adjusted(rule: str, out: int, into: int) -> float:
    """The factor on the rate of a matrix [out, in]."""
    return 0.2 * math.sqrt(max(out, into)) if rule == MATCHED else math.sqrt(max(1, out / into))


def orthogonal(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """[n, rows, columns] -> the same in `dtype`: singular vectors as they are, singular values near 1, each by itself.

    One of zeros stays zero, and so does a row or column of zeros.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    one = len(x) == 1
    x = x[0] if one else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=LEAST_NORM)
    product = torch.addmm if one else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = product(x, product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x[None] if one else x
    return x.mT if tall else x


@hookimpl
def moelab_optimizers() -> list[Component[OptimizerContext, Optimizer]]:
    return [component("muon", MuonOptions, Muon)]
