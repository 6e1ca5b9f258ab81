"""An optimizer: each number goes as far as the others, against the sign of what its gradients were of late."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import moelab


@dataclass
class Options:
    momentum: float = 0.9  # what is kept of the mean of gradients in each step


class MyOptimizer(torch.optim.Optimizer):
    """m = momentum * m + (1 - momentum) * gradient, w = (1 - lr * decay) * w - lr * sign(m)."""

    def __init__(self, options: Options, context: moelab.OptimizerContext) -> None:
        super().__init__(context.groups(), {"lr": context.settings.lr, "momentum": options.momentum})

    def kept(self, group: dict) -> moelab.Kept:
        """What it holds for each parameter: one number for each of its own, and no scalars."""
        return moelab.Kept({"mean": torch.float32}, frozenset())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """The rate of each group is set before each step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["mean"].lerp_(parameter.grad, 1 - group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(state["mean"].sign(), alpha=-group["lr"])


@moelab.hookimpl
def moelab_optimizers() -> list[moelab.Component]:
    return [moelab.component("my_optimizer", Options, MyOptimizer)]
