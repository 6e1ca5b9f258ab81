"""Where a NaN or Inf came from: the first parameter, layer, expert or loss that is not finite, forward or backward.

The failing micro-batches are computed again, with the same noise, while every layer is looked at. E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moelab.errors import RunFailure
from moelab.moe.block import MoEBlock
from moelab.moe.contracts import ExpertBackend
from moelab.moe.experts import ExpertBank
from moelab.moe.routing import Routing
from moelab.nn.pieces import let_go
from moelab.nn.transformer import DecoderLayer, Transformer
from moelab.parallel.ranks import ALONE, Ranks

Terms = Mapping[str, tuple[Tensor, float]]  # {term: (unweighted scalar, coefficient)}
Again = Sequence[Callable[[], tuple[Terms, Any]]]
LM_LOSS = "lm_loss"
SHOWN = 3  # experts that are named


class NotFinite(RunFailure):
    """A NaN or Inf: the same run would meet it again."""


def describe_failure(
    model: Transformer, step: int, again: Again, ranks: Ranks = ALONE, adapters: nn.Module | None = None
) -> str:
    """One sentence with the step and the place; the same on all ranks, which look together.

    again: for each micro-batch, a function that computes its terms, and its records, once more. Gradients are as the
    backward pass left them, not clipped.
    """
    parameter = ranks.first(bad_parameter(model))
    if parameter is not None:
        return (
            f"the loss or its gradient is NaN or Inf at step {step}; it first appears in {parameter}, which the update "
            "before made so. Start again from an earlier checkpoint with a lower optimizer.lr or grad_clip"
        )
    alone = ranks.size == 1
    where, cure = ranks.first(_output(model, again, alone)), "lower optimizer.lr, or look at that layer's data"
    if where is None:
        where, guilty = _term(again) if alone else (ranks.first(_value(again)), [])
        where = (
            where
            or ranks.first(_gradient(adapters or model, guilty))
            or "the norm of all gradients together, each of which is finite"
        )
        blamed = [name for name in guilty if name != LM_LOSS]
        if blamed and len(blamed) == len(guilty):
            cure = f"lower the weight of {' and '.join(blamed)}, or mend it"
    return (
        f"the loss or its gradient is NaN or Inf at step {step}; it first appears in {where}. "
        f"No update was made: the parameters are those of {step} good steps. To go on, {cure}"
    )


def check_evaluation(model: nn.Module, loss: float, step: int) -> None:
    """Raise RunFailure for a held-out loss that is no number."""
    if math.isfinite(loss):
        return
    where = bad_parameter(model) or "no parameter, so in what a layer computes in evaluation alone"
    raise NotFinite(f"the held-out loss is NaN or Inf after step {step}; it first appears in {where}")


@torch.no_grad()
def bad_parameter(model: nn.Module) -> str | None:
    """The first parameter or buffer that is not finite, and which experts of it."""
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"the parameter {name}{_experts(model, name, parameter)}"
    for name, buffer in model.named_buffers():
        if bool(torch.isnan(buffer).any()):  # an Inf may be meant there, in a mask say
            return f"the buffer {name}"
    return None


def _finite(tensor: Tensor | None) -> bool:
    """Of what lies in several pieces: this process's."""
    if tensor is None or not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(getattr(tensor, "to_local", lambda: tensor)()).all())


def _experts(model: nn.Module, name: str, tensor: Tensor) -> str:
    """ ", expert 3": which slices of a stacked weight [E, ...] are not finite; "" for any other tensor."""
    if not isinstance(model.get_submodule(name.rpartition(".")[0]), ExpertBank) or hasattr(tensor, "to_local"):
        return ""  # of a piece, experts are counted from its own first one
    return _listed((~torch.isfinite(tensor).flatten(1).all(1)).nonzero().flatten().tolist())


def _listed(experts: list[int]) -> str:
    if not experts:
        return ""
    more = f" and {len(experts) - SHOWN} more" if len(experts) > SHOWN else ""
    return f", expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts[:SHOWN]))}{more}"


@torch.no_grad()
def _output(model: Transformer, again: Again, alone: bool) -> str | None:
    """The first module whose output is not finite. Among other processes no micro-batch is left out: they wait."""
    found: list[str] = []
    with ExitStack() as stack:
        for label, module in _watched(model):
            stack.callback(module.register_forward_hook(_note(label, found)).remove)
        for block in (layer.mlp for layer in model.layers if isinstance(layer.mlp, MoEBlock)):
            stack.enter_context(_watching_backend(block, found))
        for compute in again:
            compute()
            if found and alone:
                break
    return f"the output of {found[0]}" if found else None


def _watched(model: Transformer) -> Iterator[tuple[str, nn.Module]]:
    yield "embed_tokens", model.embed_tokens
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        yield f"layer {index} (attention)", layer.self_attn
        if isinstance(layer.mlp, MoEBlock):
            for key in ("router", "shared_expert"):
                part = getattr(layer.mlp, key)
                if isinstance(part, nn.Module):
                    yield layer.mlp.parts[key].title, part
        yield f"layer {index} (mlp)", layer.mlp
        yield f"layer {index}", layer
    yield "norm", model.norm


def _note(label: str, found: list[str]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Routing):
            names = ("weight", "scores", "logits", "bypass")
            bad = [name for name in names if not _finite(getattr(output, name))]
            found.extend([f"{label} ({', '.join(bad)})"] if bad else [])
            return
        value = output[0] if isinstance(output, tuple) else output
        if isinstance(value, Tensor) and not _finite(value):
            found.append(label)

    return hook


@contextmanager
def _watching_backend(block: MoEBlock, found: list[str]) -> Iterator[None]:
    """The experts are computed by a backend, which is no module: it is asked through a stand-in."""
    backend = block.backend
    if isinstance(backend, nn.Module):
        yield  # the whole block is watched
        return
    block.backend = _Watched(backend, f"the experts of layer {block.layer_id}", found)
    try:
        yield
    finally:
        block.backend = backend


class _Watched:
    """A backend that looks at what it returns."""

    def __init__(self, backend: ExpertBackend, label: str, found: list[str]) -> None:
        self._backend, self._label, self._found = backend, label, found
        self.name, self.supports = backend.name, backend.supports

    def __call__(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        """x [T, D] -> [T, D]"""
        y = self._backend(x, routing, bank)
        if not _finite(y) and _finite(x):
            self._found.append(f"{self._label}{_listed(_bad_experts(x, routing, bank))}")
        return y


def _bad_experts(x: Tensor, routing: Routing, bank: ExpertBank) -> list[int]:
    """Experts whose output for their own tokens is not finite; one after the other, as a run has failed."""
    found = []
    for expert in range(bank.num_experts):
        rows = x[routing.token[routing.expert == expert]]
        if len(rows) and not _finite(bank.of_one(expert, rows)):
            found.append(expert)
    return found


@torch.no_grad()
def _value(again: Again) -> str | None:
    """A term that is not finite, of all micro-batches; whose gradient it is only one process alone finds out."""
    computed = [compute()[0] for compute in again]
    bad = {name: None for terms in computed for name, (value, _) in terms.items() if not _finite(value)}
    return f"the value of {' and '.join(bad)}" if bad else None


def _term(again: Again) -> tuple[str | None, list[str]]:
    """(a term that is not finite though every layer's output is, the terms whose value or gradient is not)."""
    guilty: dict[str, None] = {}
    with torch.enable_grad():
        for compute in again:
            terms, _ = compute()
            bad = [name for name, (value, _) in terms.items() if not _finite(value)]
            if bad:
                return f"the value of {' and '.join(bad)}", bad
            bad = [name for name, (_, weight) in terms.items() if not math.isfinite(weight)]
            if bad:
                return f"the coefficient of {' and '.join(bad)}", bad
            guilty |= dict.fromkeys(name for name, (value, weight) in terms.items() if not _teaches(value * weight))
    return None, list(guilty)


def _teaches(value: Tensor) -> bool:
    """Whether every gradient of one term is finite."""
    leaves = _leaves(value)
    gradients = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True) if leaves else ()
    return all(_finite(gradient) for gradient in gradients)


def _leaves(value: Tensor) -> list[Tensor]:
    """The parameters that `value` was computed from."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    waiting = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # AccumulateGrad
            found[id(node.variable)] = node.variable
        waiting += [following for following, _ in node.next_functions]
    return list(found.values())


def _gradient(model: nn.Module, guilty: list[str]) -> str | None:
    """Gradients flow backwards, so the last parameter is the first to be hit."""
    let_go(model)  # computed again, it would show parameters that never had a gradient
    for name, parameter in reversed(list(model.named_parameters())):
        if not _finite(parameter.grad):
            assert parameter.grad is not None
            term = f", by {' and '.join(guilty)}" if guilty else ""
            return f"the gradient of {name}{_experts(model, name, parameter.grad)}{term}"
    return None
