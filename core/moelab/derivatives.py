"""First derivatives alone: what a backward pass that is written out says to who asks for a second one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the `backward` of an autograd Function that autograd can't differentiate again.

    Silent otherwise, and wrong: what was kept or written in place counts as constant. torch's `once_differentiable`
    notices only gradients that come in with a history; that of a loss comes without.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        # torch.compile traces backward passes with gradients on, and refuses second ones itself.
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{backward.__qualname__}: create_graph=True asks for a second derivative, which isn't there; "
                "a Hessian times a vector is the difference of two gradients"
            )
        return backward(ctx, *grads)

    return checked
