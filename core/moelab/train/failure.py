"""Where a NaN or Inf came from: the first module whose output, or last whose gradient, is not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moelab.data.batches import Batch
from moelab.nn.transformer import DecoderLayer, Transformer
from moelab.train.precision import Precision

SUMS = {"loss"}  # of the terms, so never guilty itself


@torch.no_grad()
def describe_failure(
    model: Transformer, parts: list[Batch], step: int, precision: Precision, losses: Mapping[str, Tensor]
) -> str:
    """One sentence with the step and the place. Runs the failing batch forward again, looking at every layer.

    `losses`: {term: unweighted scalar}; gradients as the backward pass left them, not clipped.
    """
    where = _first_bad_parameter(model) or _first_bad_output(model, parts, precision) or _bad_loss(losses)
    where = where or _first_bad_gradient(model) or "the norm of all gradients together, each of which is finite"
    return (
        f"the loss or its gradient is NaN or Inf at step {step}; it first appears in {where}. "
        "No update was made; the last checkpoint is intact. Lower optimizer.lr, or look at that layer's data"
    )


def _first_bad_parameter(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"the parameter {name}"
    return None


def _first_bad_output(model: Transformer, parts: list[Batch], precision: Precision) -> str | None:
    found: list[str] = []

    def watch(label: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                found.append(label)

        return hook

    watched: list[tuple[str, nn.Module]] = [("embed_tokens", model.embed_tokens)]
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        watched += [(f"layer {index} (attention)", layer.self_attn), (f"layer {index} (mlp)", layer.mlp)]
        watched.append((f"layer {index}", layer))
    handles = [module.register_forward_hook(watch(label)) for label, module in [*watched, ("norm", model.norm)]]
    try:
        for part in parts:
            with precision.autocast():
                model(part.input_ids, part.attention_mask, targets=part.targets)
            if found:
                return f"the output of {found[0]}"
    finally:
        for handle in handles:
            handle.remove()
    return None


def _bad_loss(losses: Mapping[str, Tensor]) -> str | None:
    """A term that is not finite though every layer's output is: its own fault."""
    terms = {key: value for key, value in losses.items() if key not in SUMS}
    guilty = [key for key, value in terms.items() if not bool(torch.isfinite(value).all())]
    return f"the value of {' and '.join(guilty)}" if guilty else None


def _first_bad_gradient(model: nn.Module) -> str | None:
    """Gradients flow backwards, so the last parameter is the first to be hit."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"the gradient of {name}"
    return None
