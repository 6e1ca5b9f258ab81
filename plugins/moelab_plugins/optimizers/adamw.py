"""AdamW, as torch has it."""

from __future__ import annotations

from dataclasses import dataclass

from moelab import Component, OptimizerContext, component, hookimpl
from moelab.nn.optimizing import Optimizer
from moelab.training.optimizer import adamw as torch_adamw


@dataclass
class AdamWOptions:
    """None beside `optimizer`'s own keys."""


def adamw(options: AdamWOptions, context: OptimizerContext) -> Optimizer:
    """Adam with decoupled weight decay: torch.optim.AdamW, fused.

    Formula: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, w = (1 - lr wd) w - lr m_hat / (sqrt(v_hat) + eps).
    Source: Loshchilov & Hutter 2019 (1711.05101).
    Use: the default, and what the others leave embeddings, norms, routers and biases to.
    Cost: two numbers for each that is trained. With bf16 parameters or moments each is rounded at random.
    """
    del options
    return torch_adamw(context)


@hookimpl
def moelab_optimizers() -> list[Component[OptimizerContext, Optimizer]]:
    return [component("adamw", AdamWOptions, adamw)]
