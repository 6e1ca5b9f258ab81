"""What a plugin returns or raises is told before a run: part, owner, layer, what would be right, file and line."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moelab
from moelab.builder import build_balance_losses, build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.data.batches import Batch
from moelab.errors import ConfigError
from moelab.hookspecs import BALANCE_LOSSES, EXPERT_BACKENDS, EXPERT_LAYOUTS, ROUTERS, SHARED_EXPERTS
from moelab.moe.routing import Routing, TokenInfo
from moelab.registry import Registry
from moelab.training.causality import Causality
from moelab.training.precision import Precision
from moelab.training.rehearsal import probe_step
from moelab.training.step import StepSettings

PARTS = {
    "router": ROUTERS, "shared_expert": SHARED_EXPERTS, "layout": EXPERT_LAYOUTS, "backend": EXPERT_BACKENDS,
    "balance_losses": BALANCE_LOSSES,
}  # fmt: skip


@dataclass
class NoOptions:
    pass


class Sound(nn.Module):
    """A softmax top-K router, from which the faulty ones differ in one point."""

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__()
        self.top_k, self.layer_id = context.num_experts_per_tok, context.layer_id
        self.weight = nn.Parameter(torch.empty(context.num_experts, context.hidden_size))

    def forward(self, x: Tensor, info: TokenInfo) -> Any:
        return self.spoil(self.route(x, info), x, info)

    def route(self, x: Tensor, info: TokenInfo) -> Routing:
        logits = x.float() @ self.weight.float().t()
        weight, expert = logits.softmax(-1).topk(self.top_k)
        return Routing.from_topk(expert, weight, len(self.weight), scores=logits.softmax(-1), logits=logits)

    def spoil(self, routing: Routing, x: Tensor, info: TokenInfo) -> Any:
        return routing


def _router(spoil: Callable[[Routing, Tensor, TokenInfo], Any]) -> Any:
    return type("Spoilt", (Sound,), {"spoil": lambda self, r, x, i: spoil(r, x, i), "__module__": __name__})


def _probe(part: str, build: Any, **moe: Any) -> Causality:
    """Build a small model with `build` as the component 'bad' of this module, and rehearse a step."""
    module = types.ModuleType(__name__)
    made = build if isinstance(build, type) else _named(build)
    offered = moelab.component("bad", NoOptions, made)
    setattr(module, PARTS[part].hook, moelab.hookimpl(lambda: [offered]))
    registry = Registry(entry_points=False)
    registry.manager.register(module, name=__name__)
    node: Any = [{"name": "bad"}] if part == "balance_losses" else {"name": "bad"}
    layout = {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config = ModelConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3, moe=MoEConfig(**({"layout": layout, part: node} | moe)),
    )  # fmt: skip
    model = build_model(config, registry, seed=1)
    losses = build_balance_losses(config, registry)
    ids = torch.randint(0, 64, (2, 25), generator=torch.Generator().manual_seed(3))
    zeros = torch.zeros(2, 24, dtype=torch.int64)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), zeros, zeros)
    settings = StepSettings(2, 1.0, 0, Precision(torch.device("cpu"), torch.float32))
    return probe_step(model, losses, batch, settings).causality


def _named(build: Any) -> Any:
    build.__module__ = __name__
    return build


def _told(part: str, build: Any, **moe: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        _probe(part, build, **moe)
    return str(caught.value)


def _here(message: str) -> bool:
    return (
        re.search(rf"\({re.escape(Path(__file__).name)}:\d+\)$", message) is not None or "test_rehearsal.py:" in message
    )


ROUTER_FAULTS = {
    "a tuple": (lambda r, x, i: (r.expert, r.weight), "returned a tuple; it must return a moelab.Routing"),
    "nothing": (lambda r, x, i: None, "returned None; it must return a moelab.Routing"),
    "a list of ids": (lambda r, x, i: replace(r, expert=r.expert.tolist()), "returned expert as a list; it must"),
    "int32 ids": (lambda r, x, i: replace(r, expert=r.expert.int()), "returned expert ids in torch.int32"),
    "float tokens": (lambda r, x, i: replace(r, token=r.token.float()), "returned token ids in torch.float32"),
    "no weight": (lambda r, x, i: replace(r, weight=None), "returned weight as None"),
    "weights of [T, K]": (lambda r, x, i: replace(r, weight=r.weight.view(-1, 2)), "each must be [N]"),
    "bfloat16 weights": (lambda r, x, i: replace(r, weight=r.weight.bfloat16()), "must be float32"),
    "weights elsewhere": (lambda r, x, i: replace(r, weight=r.weight.to("meta")), "on meta for an input on cpu"),
    "an expert too far": (lambda r, x, i: replace(r, expert=r.expert + 1), "chose an expert outside 0 .. 3"),
    "a token too far": (lambda r, x, i: replace(r, token=r.token + 1, top_k=None), "routed a token outside 0 .. 15"),
    "NaN weights": (lambda r, x, i: replace(r, weight=r.weight * float("nan")), "weights that are NaN or Inf"),
    "NaN scores": (lambda r, x, i: replace(r, scores=r.scores * float("inf")), "scores that are NaN or Inf"),
    "negative scores": (lambda r, x, i: replace(r, scores=-r.scores), "returned a negative score"),
    "another number of tokens": (lambda r, x, i: replace(r, num_tokens=4), "not (16, 4)"),
    "scores transposed": (lambda r, x, i: replace(r, scores=r.scores.t()), "returned scores as float32 [4, 16]"),
    "too few scores": (lambda r, x, i: replace(r, scores=r.scores[:, :2]), "with a column for each expert"),
    "a false top_k": (lambda r, x, i: replace(r, token=r.token.flip(0)), "set top_k 2, but token is not each of"),
    "a mask of numbers": (lambda r, x, i: replace(r, token_mask=torch.ones(16)), "returned token_mask as float32 [16]"),
    "choices of one expert": (lambda r, x, i: replace(r, choices=r.scores[:, 0] > 0), "returned choices as bool [16]"),
    "a heavy placeholder": (lambda r, x, i: replace(r, served=r.token < 0), "with a weight other than 0"),
    "a bypass of one number": (lambda r, x, i: replace(r, bypass=x[:, 0]), "returned bypass as float32 [16]"),
    "extras in a list": (lambda r, x, i: replace(r, extras=[]), "returned extras as a list"),
    "a tuple in evaluation": (lambda r, x, i: r if i.training else (r,), "returned a tuple"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "words"), ROUTER_FAULTS.values(), ids=ROUTER_FAULTS)
def test_what_a_router_returns_is_told(spoil: Any, words: str) -> None:
    message = _told("router", _router(spoil))
    assert message.startswith(f"model.moe.router: router 'bad' of {__name__}, layer 0: ")
    assert words in message
    assert _here(message), message


class ThroughHelper(Sound):
    def forward(self, x: Tensor, info: TokenInfo) -> Any:
        return _deeper(x) + torch.zeros(3)


def _deeper(x: Tensor) -> Any:
    return x + "text"


class ThroughTorch(Sound):
    def forward(self, x: Tensor, info: TokenInfo) -> Any:
        return torch.cat([x, x[:, :1]])


class Constructor(Sound):
    def __init__(self, options: Any, context: Any) -> None:
        raise KeyError(context.layer_id)


class AfterStep(Sound):
    def after_step(self, counts: Tensor) -> None:
        self.weight.missing()  # type: ignore[operator]


class WrongArguments(Sound):
    def after_step(self) -> None: ...


class Initialises(Sound):
    def initialise(self, generator: Any) -> None:
        self.weight.copy_(torch.zeros(3, 3))


RAISING = {
    "in a helper of forward": (ThroughHelper, "raised TypeError", _deeper),
    "in torch, called from forward": (ThroughTorch, "raised RuntimeError", ThroughTorch.forward),
    "in its constructor": (Constructor, "raised KeyError: 0", Constructor.__init__),
    "in after_step": (AfterStep, "raised AttributeError", AfterStep.after_step),
    "in initialise": (Initialises, "raised RuntimeError", Initialises.initialise),
}  # fmt: skip


@pytest.mark.parametrize(("build", "words", "function"), RAISING.values(), ids=RAISING)
def test_what_a_router_raises_is_told_with_its_own_line(build: Any, words: str, function: Any) -> None:
    message = _told("router", build)
    assert message.startswith(f"model.moe.router: router 'bad' of {__name__}, layer 0: {words}")
    assert f"test_rehearsal.py:{function.__code__.co_firstlineno + 1})" in message


def test_a_method_without_its_arguments_is_told() -> None:
    assert "after_step" in _told("router", WrongArguments)


def test_what_is_no_module_is_told() -> None:
    assert "built a tuple, which is no torch.nn.Module" in _told("router", lambda options, context: ())


class SoundLoss:
    weight, needs_batch_counts = 0.1, False

    def __init__(self, options: Any, context: Any) -> None: ...

    def __call__(self, records: Any, context: Any) -> Any:
        return torch.stack([record.routing.scores.square().mean() for record in records]).mean()


def _loss(call: Any = SoundLoss.__call__, **members: Any) -> Any:
    return type("Loss", (SoundLoss,), {"__call__": call, "__module__": __name__, **members})


LOSS_FAULTS = {
    "a vector": (_loss(lambda self, r, c: r[0].routing.scores.mean(1)), "returned a tensor of shape (16,)"),
    "a float": (_loss(lambda self, r, c: 0.5), "returned a float, not a float scalar"),
    "a whole number": (_loss(lambda self, r, c: torch.tensor(3)), "in torch.int64, not a float scalar"),
    "no gradient": (_loss(lambda self, r, c: r[0].routing.scores.detach().mean()), "a value without a gradient"),
    "an error": (_loss(lambda self, r, c: r.missing), "raised AttributeError: 'list' object has no"),
    "weight as text": (_loss(weight="0.1"), "has weight '0.1'; it must be a number"),
    "counts as text": (_loss(needs_batch_counts=None), "has no `needs_batch_counts`"),
    "after_step": (_loss(after_step=lambda self, context: context.missing), "raised AttributeError"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "words"), LOSS_FAULTS.values(), ids=LOSS_FAULTS)
def test_what_a_balance_loss_does_is_told(build: Any, words: str) -> None:
    message = _told("balance_losses", build)
    assert message.startswith(f"model.moe.balance_losses.0: balance loss 'bad' of {__name__}: ")
    assert words in message
    assert _here(message), message


def test_a_loss_without_a_weight_is_told() -> None:
    class Weightless:
        def __init__(self, options: Any, context: Any) -> None: ...

        def __call__(self, records: Any, context: Any) -> Tensor:
            return torch.zeros(())

    assert "has no `weight`; it must be a number" in _told("balance_losses", Weightless)


def _shared(forward: Any, **members: Any) -> Any:
    def build(self: Any, options: Any, context: Any) -> None:
        nn.Module.__init__(self)

    body = {"__init__": build, "forward": forward, "intermediate_size": 4, "__module__": __name__}
    return type("Shared", (nn.Module,), body | members)


SHARED_FAULTS = {
    "another shape": (_shared(lambda self, x: x[:, :3]), "shape [16, 3] for an input of [16, 16]"),
    "another dtype": (_shared(lambda self, x: x.double()), "returned an output in torch.float64"),
    "a tuple": (_shared(lambda self, x: (x,)), "returned a tuple; it must return a tensor"),
    "no width": (_shared(lambda self, x: x, intermediate_size=None), "has intermediate_size None"),
    "later tokens": (_shared(lambda self, x: x - x.mean(0)), "looks at later tokens in training"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "words"), SHARED_FAULTS.values(), ids=SHARED_FAULTS)
def test_what_a_shared_expert_does_is_told(build: Any, words: str) -> None:
    message = _told("shared_expert", build)
    assert message.startswith(f"model.moe.shared_expert: shared expert 'bad' of {__name__}, layer 0: ")
    assert words in message
    assert _here(message), message


def _backend(call: Any, **members: Any) -> Any:
    body = {"__init__": lambda self, o, c: None, "__call__": call, "name": "bad", "supports": lambda self, p: None}
    return type("Backend", (), body | {"__module__": __name__} | members)


BACKEND_FAULTS = {
    "another shape": (_backend(lambda self, x, r, b: x[:3]), "returned an output of shape [3, 16]"),
    "another dtype": (_backend(lambda self, x, r, b: x.double()), "returned an output in torch.float64"),
    "supports a number": (_backend(lambda self, x, r, b: x, supports=lambda self, p: True), "supports() returned True"),
    "no name": (_backend(lambda self, x, r, b: x, name=None), "has name None; it must be a text"),
    "an error": (_backend(lambda self, x, r, b: b.missing), "raised AttributeError"),
    "later tokens": (_backend(lambda self, x, r, b: x.flip(0)), "looks at later tokens in training"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "words"), BACKEND_FAULTS.values(), ids=BACKEND_FAULTS)
def test_what_a_backend_does_is_told(build: Any, words: str) -> None:
    message = _told("backend", build)
    assert message.startswith(f"model.moe.backend: expert backend 'bad' of {__name__}, layer 0: ")
    assert words in message
    assert _here(message), message


LAYOUT_FAULTS = {
    "a tuple": (lambda o, c: (4, 2, 8), "returned a tuple; it must return a moelab.ExpertLayout, or None"),
    "a fraction": (lambda o, c: moelab.ExpertLayout(4, 2, 8.5), "returned moe_intermediate_size 8.5"),  # type: ignore[arg-type]
    "text": (lambda o, c: moelab.ExpertLayout("4", 2, 8), "returned num_experts '4'"),  # type: ignore[arg-type]
    "too few widths": (lambda o, c: moelab.ExpertLayout(4, 2, 8, (8, 8)), "there must be one for each of 4 experts"),
    "an error": (lambda o, c: c.missing, "raised AttributeError"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "words"), LAYOUT_FAULTS.values(), ids=LAYOUT_FAULTS)
def test_what_a_layout_returns_is_told(build: Any, words: str) -> None:
    message = _told("layout", build)
    assert message.startswith(f"model.moe.layout: expert layout 'bad' of {__name__}, layer 0: ")
    assert words in message


NONCAUSAL = {
    "the mean of all tokens": lambda self, x, i: Sound.route(self, x - x.mean(0), i),
    "the next token's state": lambda self, x, i: Sound.route(self, x + x.roll(-1, 0), i),
    "the next token's id": lambda self, x, i: Sound.route(self, x + i.token_id.roll(-1)[:, None] * 0.1, i),
    "the length of the text": lambda self, x, i: Sound.route(self, x * x.norm(), i),
    "room in an expert": lambda self, x, i: _crowded(Sound.route(self, x, i)),
}


def _crowded(routing: Routing) -> Routing:
    """An expert serves its four heaviest assignments, whoever came first."""
    order = routing.weight.detach().argsort(descending=True)
    rank = torch.zeros_like(routing.expert)
    for expert in range(4):
        mine = order[routing.expert[order] == expert]
        rank[mine] = torch.arange(len(mine))
    return routing.serve(rank < 4)


@pytest.mark.parametrize("route", NONCAUSAL.values(), ids=NONCAUSAL)
def test_a_router_that_looks_ahead_unsaid_is_refused(route: Any) -> None:
    bad = type("Ahead", (Sound,), {"route": route, "__module__": __name__})
    message = _told("router", bad)
    assert "layer 0: looks at later tokens in training: weights of earlier tokens change by" in message
    found = _probe("router", bad, allow_noncausal=True)
    assert found.noncausal == {"training": [0, 1], "evaluation": [0, 1]}


def test_one_that_looks_ahead_in_evaluation_alone_is_refused() -> None:
    def route(self: Any, x: Tensor, info: TokenInfo) -> Routing:
        return Sound.route(self, x if info.training else x - x.mean(0), info)

    assert "in evaluation: " in _told("router", type("Ahead", (Sound,), {"route": route, "__module__": __name__}))


CAUSAL = {
    "noise from the global stream": lambda self, x, i: Sound.route(self, x + torch.randn(x.shape), i),
    "noise from the batch's stream": lambda self, x, i: Sound.route(
        self, x + torch.randn(x.shape, generator=i.generator), i
    ),
    "a mean of earlier tokens": lambda self, x, i: Sound.route(self, x + x.cumsum(0), i),
    "nothing": Sound.route,
}


@pytest.mark.parametrize("route", CAUSAL.values(), ids=CAUSAL)
def test_a_causal_router_is_believed(route: Any) -> None:
    good = type("Good", (Sound,), {"route": route, "__module__": __name__})
    assert _probe("router", good).noncausal == {"training": [], "evaluation": []}


@pytest.mark.parametrize(
    ("node", "found"),
    [
        ({"name": "expert_choice"}, {"training": [0, 1], "evaluation": []}),
        ({"name": "mixture_of_depths"}, {"training": [0, 1], "evaluation": []}),
        ({"name": "token_rounding"}, {"training": [0, 1], "evaluation": []}),
        ({"name": "sinkhorn"}, {"training": [0, 1], "evaluation": []}),
        ({"name": "moe_plus_plus", "capacity_factor": 1.0}, {"training": [0, 1], "evaluation": []}),
        ({"name": "switch", "capacity_factor": 1.0}, {"training": [0, 1], "evaluation": []}),
        ({"name": "softmax_topk", "eval_capacity_factor": 1.0}, {"training": [], "evaluation": [0, 1]}),
        ({"name": "softmax_topk"}, {"training": [], "evaluation": []}),
        (
            {"name": "softmax_topk", "document_pool": {"smallest": 2, "largest": 3}},
            {"training": [0, 1], "evaluation": []},
        ),
        (
            {"name": "softmax_topk", "document_pool": {"smallest": 2, "largest": 2, "evaluation": 2}},
            {"training": [0, 1], "evaluation": [0, 1]},
        ),
        ({"name": "softmax_topk", "token_table": {}}, {"training": [], "evaluation": []}),
        ({"name": "expert_threshold"}, {"training": [], "evaluation": []}),
        ({"name": "gshard"}, {"training": [], "evaluation": []}),
        ({"name": "noisy_topk"}, {"training": [], "evaluation": []}),
        ({"name": "top_p"}, {"training": [], "evaluation": []}),
    ],
    ids=str,
)
def test_built_in_routers_say_what_they_are(
    node: dict[str, Any], found: dict[str, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    context = {"layout": {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}}
    if node["name"] == "switch":
        context["layout"]["num_experts_per_tok"] = 1
    noncausal = any(found.values())
    outcome = _probe("balance_losses", SoundLoss, router=node, allow_noncausal=noncausal, **context)
    assert outcome.noncausal == found
    lines = [r.getMessage() for r in caplog.records if "looks at later tokens" in r.getMessage()]
    assert len(lines) == noncausal
    assert not noncausal or f"router '{node['name']}'" in lines[0]


def test_the_probe_leaves_no_trace() -> None:
    """Buffers, parameters, random numbers and the mode are as before."""
    assert "moelab" in sys.modules
    before = torch.random.get_rng_state()
    _probe("router", Sound)
    assert torch.equal(torch.random.get_rng_state(), before)
