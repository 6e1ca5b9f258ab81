"""What each part of a MoE layer promised to be and to return, checked where it is built and first called.

Each function answers with a phrase for `PluginPart.fault`, "returned a tuple; it must return ...", or None. Those that
look at values wait for the device, and are asked once. The conformance kit asks the same functions.

T tokens, D hidden size, E experts, E' choices, N assignments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moelab.moe.contracts import ExpectedAssignments
from moelab.moe.experts import compute_dtype
from moelab.moe.routing import Routing
from moelab.plugin_faults import article

ROUTING = "it must return a moelab.Routing (moelab.moe.routing.Routing)"
ASSIGNMENTS = ("token", "expert", "weight")


def router_built(router: object) -> str | None:
    """Of what a router component built."""
    if not isinstance(router, nn.Module):
        return f"built {article(router)}, which is no torch.nn.Module"
    declared = getattr(router, "expected_assignments", None)
    if declared is not None and not isinstance(declared, ExpectedAssignments):
        return f"has expected_assignments {declared!r}; it must be a moelab.ExpectedAssignments"
    for key in ("causal", "causal_in_evaluation", "forced", "batch_invariant"):
        value = getattr(router, key, True)
        if not isinstance(value, bool):
            return f"has {key} {value!r}; it must be True or False"
    return _not_callable(router, ("initialise", "after_step", "qwen2_moe_fields", "weigh"))


def batch_invariant(router: object) -> bool:
    """Whether a token's experts, in training too, are the same in any batch (`Router.batch_invariant`)."""
    return bool(getattr(router, "batch_invariant", getattr(router, "causal", True)))


def shared_expert_built(shared: object) -> str | None:
    """Of what a shared expert component built; None is no shared expert."""
    if shared is None:
        return None
    if not isinstance(shared, nn.Module):
        return f"built {article(shared)}, which is no torch.nn.Module and not None"
    width = getattr(shared, "intermediate_size", None)
    if type(width) is not int or width < 0:
        return f"has intermediate_size {width!r}; it must be the number of neurons that a token passes through"
    return _not_callable(shared, ("initialise", "qwen2_moe_fields"))


def backend_built(backend: object) -> str | None:
    """Of what an expert backend component built."""
    name = getattr(backend, "name", None)
    if not callable(backend):
        return f"built {article(backend)}, which can't be called with (x, routing, bank)"
    if not isinstance(name, str) or not name:
        return f"has name {name!r}; it must be a text"
    if not callable(getattr(backend, "supports", None)):
        return "has no method supports(problem)"
    return None


def activation_built(activation: object) -> str | None:
    """Of what an activation component built."""
    if not callable(activation):
        return f"built {article(activation)}, which can't be called with (gate, up) or (up)"
    if not isinstance(getattr(activation, "gated", None), bool):
        return "has no `gated`; it must be True for (gate, up), or False for (up) alone"
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        return "has parameters; an activation has none"
    return _not_callable(activation, ("differentiate", "qwen2_moe_fields"))


def loss_built(loss: object) -> str | None:
    """Of what a balance loss component built."""
    if not callable(loss):
        return f"built {article(loss)}, which can't be called with (records, context)"
    weight = getattr(loss, "weight", None)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        missing = "has no `weight`" if not hasattr(loss, "weight") else f"has weight {weight!r}"
        return f"{missing}; it must be a number, the coefficient that the trainer applies"
    if not isinstance(getattr(loss, "needs_batch_counts", None), bool):
        return "has no `needs_batch_counts`; it must be True or False: whether it reads context.batch_counts"
    if hasattr(loss, "state_dict") != hasattr(loss, "load_state_dict"):
        return "has one of state_dict and load_state_dict, and needs both"
    return _not_callable(loss, ("after_step", "batch_count", "state_dict", "load_state_dict", "qwen2_moe_fields"))


def routing_shape(routing: object, x: Tensor, num_experts: int) -> str | None:
    """Type, shapes and dtypes of what a router returned for x [T, D]; waits for nothing, so asked at each call."""
    if not isinstance(routing, Routing):
        return f"returned {article(routing)}; {ROUTING}"
    tensors = [getattr(routing, name) for name in ASSIGNMENTS]
    for name, value in zip(ASSIGNMENTS, tensors, strict=True):
        if not isinstance(value, Tensor):
            return f"returned {name} as {article(value)}; it must be a tensor [N]"
    wanted = (x.shape[0], num_experts)
    if (routing.num_tokens, routing.num_experts) != wanted:
        found = (routing.num_tokens, routing.num_experts)
        return f"returned a routing of (tokens, experts) {found}, not {wanted}"
    if not tensors[0].shape == tensors[1].shape == tensors[2].shape or tensors[2].ndim != 1:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        return f"returned token, expert and weight of shapes {shapes}; each must be [N]"
    for name, value in zip(ASSIGNMENTS[:2], tensors[:2], strict=True):
        if value.dtype != torch.int64:
            return f"returned {name} ids in {value.dtype}; they must be int64"
    if routing.weight.dtype not in (torch.float32, torch.float64):
        return f"returned weights in {routing.weight.dtype}; they must be float32"
    for name in ("scores", "logits"):
        value = getattr(routing, name)
        if value is not None and (not isinstance(value, Tensor) or value.ndim != 2 or value.shape[0] != x.shape[0]):
            return f"returned {name} as {_described(value)}; they must be [{x.shape[0]}, E]"
    return None


def routing_values(routing: Routing, x: Tensor) -> str | None:
    """All the rest of it, values too; of a routing whose shape is right. Waits for the device."""
    return next(_faults_of_values(routing, x), None)


def gradient_beyond_choice(routing: Routing) -> str | None:
    """Why weights of experts that a token did not take have no gradient, and what would do; None where they have.

    They are taken for its scores times the factor that its own weights are of their scores. Rounding is let pass.
    """
    if routing.weights_on_input:
        return "weights on the experts' input have none there; set weights_on output"
    if routing.scores is None:
        return None
    served = routing.compact()
    scores, weight = routing.scores[served.token, served.expert], served.weight
    sums = weight.new_zeros(2, routing.num_tokens).index_add(1, served.token, torch.stack([weight, scores.to(weight)]))
    factor = sums[0] / sums[1].clamp_min(torch.finfo(weight.dtype).tiny)
    apart = (weight - factor[served.token] * scores).abs().sum()
    if apart <= 0.05 * weight.abs().sum():
        return None
    return "this router's weights are not a token's scores times one factor; take softmax_topk or one of its kind"


def output(y: object, x: Tensor, what: str = "output") -> str | None:
    """Of what a backend or a shared expert returned for x [T, D]."""
    if not isinstance(y, Tensor):
        return f"returned {article(y)}; it must return a tensor {list(x.shape)}"
    if y.shape != x.shape:
        return f"returned an {what} of shape {list(y.shape)} for an input of {list(x.shape)}; they must be equal"
    if y.dtype not in (x.dtype, compute_dtype(x)):
        return f"returned an {what} in {y.dtype} for an input in {x.dtype}; they must be equal"
    if y.device != x.device:
        return f"returned an {what} on {y.device} for an input on {x.device}"
    return None


def support(reason: object) -> str | None:
    """Of what a backend's `supports` returned."""
    if reason is None or (isinstance(reason, str) and reason):
        return None
    return f"supports() returned {reason!r}; it must return None, or why not as a text"


def loss_value(value: object) -> str | None:
    """Of what a balance loss returned."""
    if not isinstance(value, Tensor):
        return f"returned {article(value)}, not a float scalar (a tensor of shape [])"
    if value.ndim != 0 or not value.is_floating_point():
        return f"returned a tensor of shape {tuple(value.shape)} in {value.dtype}, not a float scalar"
    return None


def _faults_of_values(routing: Routing, x: Tensor) -> Iterator[str]:
    tokens, experts = routing.num_tokens, routing.num_experts
    yield from _faults_of_fields(routing, x)
    if routing.expert.numel():
        if not 0 <= int(routing.expert.min()) <= int(routing.expert.max()) < experts:
            yield f"chose an expert outside 0 .. {experts - 1}"
        if not 0 <= int(routing.token.min()) <= int(routing.token.max()) < tokens:
            yield f"routed a token outside 0 .. {tokens - 1}"
    if bool(torch.isfinite(x).all()):
        floats = {"weights": "weight"} | {name: name for name in ("scores", "logits", "bypass", "statistics")}
        for words, field in floats.items():
            value = getattr(routing, field)
            if value is not None and not bool(torch.isfinite(value).all()):
                yield f"returned {words} that are NaN or Inf for a finite input"
    if routing.scores is not None and bool((routing.scores < 0).any()):
        yield "returned a negative score; logits may be negative, scores not"
    if routing.top_k is not None:
        expected = torch.arange(tokens, device=x.device).repeat_interleave(routing.top_k)
        if not torch.equal(routing.token, expected):
            yield f"set top_k {routing.top_k}, but token is not each of {tokens} tokens that often, in order"
    if routing.served is not None and bool((routing.weight[~routing.served] != 0).any()):
        yield "returned a placeholder (served False) with a weight other than 0"


def _faults_of_fields(routing: Routing, x: Tensor) -> Iterator[str]:
    """Shapes, dtypes and devices of the optional fields."""
    tokens, rows = routing.num_tokens, tuple(routing.expert.shape)
    for name in ("scores", "logits"):
        value = getattr(routing, name)
        if value is not None and (value.shape[1] < routing.num_experts or not value.is_floating_point()):
            yield f"returned {name} as {_described(value)}; they must be float32 with a column for each expert"
    wanted: dict[str, tuple[Callable[[Tensor], bool], str]] = {
        "token_mask": (lambda v: v.dtype == torch.bool and tuple(v.shape) == (tokens,), f"bool [{tokens}]"),
        "served": (lambda v: v.dtype == torch.bool and tuple(v.shape) == rows, f"bool {list(rows)}"),
        "choices": (
            lambda v: (
                v.dtype == torch.bool and v.ndim == 2 and v.shape[0] == tokens and v.shape[1] >= routing.num_experts
            ),
            f"bool [{tokens}, E]",
        ),
        "dropped": (lambda v: v.ndim == 0 and not v.is_floating_point(), "a whole number []"),
        "bypass": (lambda v: v.shape == x.shape and v.is_floating_point(), f"{list(x.shape)}"),
        "statistics": (lambda v: v.ndim == 1 and v.is_floating_point(), "float32 [M]"),
    }
    for name, (right, words) in wanted.items():
        value = getattr(routing, name)
        if value is not None and not (isinstance(value, Tensor) and right(value)):
            yield f"returned {name} as {_described(value)}; it must be {words}"
    for name in (*ASSIGNMENTS, "scores", "logits", *wanted):
        value = getattr(routing, name)
        if isinstance(value, Tensor) and value.device != x.device:
            yield f"returned {name} on {value.device} for an input on {x.device}"
    most = routing.num_experts if routing.scores is None else routing.scores.shape[1]
    if not 0 <= routing.counted_top_k <= most:
        yield f"set balance_top_k {routing.balance_top_k}, and there are {most} scores"
    if not isinstance(routing.extras, dict):
        yield f"returned extras as {article(routing.extras)}; it must be a dict of tensors"


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return article(value)
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _not_callable(part: object, names: tuple[str, ...]) -> str | None:
    wrong = [name for name in names if getattr(part, name, None) is not None and not callable(getattr(part, name))]
    return f"has {wrong[0]}, which can't be called" if wrong else None
