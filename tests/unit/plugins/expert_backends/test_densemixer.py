"""DenseMixer against its formula, a dense sum in float64: the same output, a router that hears all experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expert_routings import EXPERTS, TOP_K, bank, output_of
from moelab import BackendContext, ConfigError, ExpertBackend, Registry, Routing
from moelab.builder import build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.hookspecs import EXPERT_BACKENDS
from moelab.moe.block import MoEBlock
from moelab.moe.contracts import ExpertProblem
from moelab.moe.experts import ExpertBank
from moelab.moe.layout import ExpertLayout
from moelab.nn.count import flops_per_token, forward_flops_per_token, served_costs
from moelab.testing.tensors import dense_weights, fill_parameters, make_info

HIDDEN, WIDTH, TOKENS = 16, 8, 23
REGISTRY = Registry(entry_points=False)
LAYOUT = ExpertLayout(EXPERTS, TOP_K, WIDTH)


def backend(inner: str = "loop", dtype: torch.dtype = torch.float64) -> ExpertBackend:
    alone = BackendContext(LAYOUT, HIDDEN, 0, dict)
    others = {name: REGISTRY.build(EXPERT_BACKENDS, {"name": name}, alone, "here") for name in ("loop", "batched")}
    context = BackendContext(LAYOUT, HIDDEN, 0, lambda: others)
    made = REGISTRY.build(EXPERT_BACKENDS, {"name": "densemixer", "inner": inner}, context, "here")
    problem = ExpertProblem(EXPERTS, HIDDEN, WIDTH, TOKENS, TOKENS * TOP_K, torch.device("cpu"), dtype)
    assert made.supports(problem) is None
    return made


def routing_of(logits: Tensor, normalised: bool, drop: bool = False) -> Routing:
    scores = logits.softmax(-1)
    expert = scores.topk(TOP_K).indices
    weight = scores.gather(1, expert)
    if normalised:
        weight = weight / weight.sum(-1, keepdim=True)
    made = Routing.from_topk(expert, weight, EXPERTS, scores=scores)
    return made.serve(torch.arange(expert.numel()) % 5 > 0) if drop else made


def every_output(x: Tensor, experts: ExpertBank) -> Tensor:
    """[T, E, D], each expert by itself."""
    every = range(experts.num_experts)
    return torch.stack([torch.stack([output_of(experts, e, row) for e in every]) for row in x.double()]).to(x.dtype)


def by_formula(logits: Tensor, outputs: Tensor, upstream: Tensor, normalised: bool) -> Tensor:
    """dL/dlogits where dL/dp_e is <dL/dy, f_e> for all e: of the official code, by the chain rule."""
    leaf = logits.detach().clone().requires_grad_()
    scores = leaf.softmax(-1)
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(TOP_K).indices, 1.0)
    ratio = (scores * chosen).sum(-1, keepdim=True) if normalised else torch.ones(len(scores), 1, dtype=scores.dtype)
    weight = scores * chosen / ratio + scores * (1 - chosen) / ratio.detach()
    inner = torch.einsum("td,ted->te", upstream, outputs.detach())
    return torch.autograd.grad((weight * inner).sum(), leaf)[0]


@pytest.mark.parametrize(("normalised", "bias"), [(False, False), (True, False), (True, True)])
def test_the_router_hears_of_every_expert_and_nothing_else_changes(normalised: bool, bias: bool):
    torch.manual_seed(3)
    experts, x = bank(HIDDEN, WIDTH, bias=bias), torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(TOKENS, EXPERTS, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    plain = REGISTRY.build(EXPERT_BACKENDS, {"name": "loop"}, BackendContext(LAYOUT, HIDDEN, 0, dict), "here")
    found, wanted = (one(x, routing_of(logits, normalised), experts) for one in (backend(), plain))
    assert torch.equal(found, wanted)
    leaves = [x, *experts.parameters()]
    ours = torch.autograd.grad((found * upstream).sum(), [logits, *leaves])
    theirs = torch.autograd.grad((wanted * upstream).sum(), [logits, *leaves])
    for mine, sparse in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine, sparse, rtol=1e-12, atol=1e-14)
    dense = by_formula(logits, every_output(x, experts), upstream, normalised)
    torch.testing.assert_close(ours[0], dense, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(ours[0], theirs[0], rtol=0.1)


def test_a_dropped_assignment_is_heard_as_one_that_was_not_chosen():
    torch.manual_seed(4)
    experts, x = bank(HIDDEN, WIDTH), torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    logits = torch.randn(TOKENS, EXPERTS, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    routing = routing_of(logits, normalised=False, drop=True)
    found = torch.autograd.grad((backend()(x, routing, experts) * upstream).sum(), logits)[0]
    # Without normalisation the weights are the scores, so a drop changes the output and no derivative of it.
    wanted = by_formula(logits, every_output(x, experts), upstream, normalised=False)
    served = torch.zeros(TOKENS, dtype=torch.bool).index_fill(0, routing.token[routing.served], True)
    torch.testing.assert_close(found[served], wanted[served], rtol=1e-10, atol=1e-12)


def test_without_a_gradient_nothing_more_is_computed(monkeypatch: pytest.MonkeyPatch):
    from moelab_plugins.expert_backends import densemixer

    monkeypatch.setattr(densemixer, "_every_expert", lambda x, experts: pytest.fail("computed"))
    x, experts = torch.randn(TOKENS, HIDDEN), bank(HIDDEN, WIDTH, torch.float32)
    with torch.no_grad():
        backend("batched", torch.float32)(x, routing_of(torch.randn(TOKENS, EXPERTS), False), experts)


def test_a_router_without_scores_is_refused():
    routing = Routing.from_topk(
        torch.zeros(TOKENS, 1, dtype=torch.int64), torch.rand(TOKENS, 1).requires_grad_(), EXPERTS
    )
    with pytest.raises(ConfigError, match="densemixer needs the scores of every expert"):
        backend()(torch.randn(TOKENS, HIDDEN, dtype=torch.float64), routing, bank(HIDDEN, WIDTH))


def model(name: str, **options: object) -> torch.nn.Module:
    moe = MoEConfig(
        layout={"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 5},
        backend={"name": name, **options},
    )
    config = ModelConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, moe=moe,
    )  # fmt: skip
    return build_model(config, REGISTRY, seed=0)


def test_flops_count_one_forward_pass_of_the_experts_that_were_not_taken():
    plain, mixed = model("loop"), model("densemixer", inner="loop")
    more = 3 * (8 - 2) * 2 * (3 * 5 * 16)
    assert flops_per_token(mixed, 16) - flops_per_token(plain, 16) == more
    assert served_costs(mixed, 16).token_flops - served_costs(plain, 16).token_flops == more
    assert forward_flops_per_token(mixed, 16) == forward_flops_per_token(plain, 16)  # generation is the inner's


def test_it_runs_in_a_model_with_the_default_backend_inside_and_auto_never_takes_it():
    ids = torch.arange(12)[None]
    mixed = model("densemixer")
    logits = mixed(ids).logits
    assert torch.equal(logits, model("auto")(ids).logits)
    logits.sum().backward()
    auto = model("auto")
    auto(ids)
    blocks = [module for module in auto.modules() if isinstance(module, MoEBlock)]
    chosen = [why for block in blocks for why in block.backend.choices.values()]
    assert chosen and not any(why.startswith("densemixer") for why in chosen)


def test_an_unknown_inner_backend_is_named():
    with pytest.raises(ConfigError, match=r"layer 0: 'densemixer' .* there is no backend 'swift' .* Known: auto"):
        model("densemixer", inner="swift")(torch.arange(4)[None])


COMPOSED = [
    {"name": "sigmoid_topk", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    {"name": "softmax_topk", "topk_first": True, "gate_bias": True},
    {"name": "softmax_topk", "gate": "cosine", "cosine_size": 6, "document_pool": {"smallest": 3, "largest": 3}},
    {"name": "sqrtsoftplus_topk", "token_table": {}, "balance": "none"},
    {"name": "null_experts", "num_null_experts": 4, "null_output": "copy", "norm_topk_prob": False},
    {"name": "expert_threshold"},
]


@pytest.mark.parametrize("router", COMPOSED, ids=",".join)
def test_any_router_whose_weights_are_its_scores_hears_of_every_expert(router: dict[str, object]):
    """In a layer: the same output bit for bit, and the gate's gradient is that of sum_S w_e a_e + sum_others c s_e a_e,
    a_e = <dL/dy, f_e(x)>.
    """
    made = []
    for backend_node in ({"name": "densemixer", "inner": "loop"}, {"name": "loop"}):
        moe = MoEConfig(
            layout={"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 5},
            router=router, backend=backend_node, allow_noncausal=True,
        )  # fmt: skip
        block = build_model(ModelConfig(32, HIDDEN, 24, 1, 2, 1, moe=moe), REGISTRY, seed=0).layers[0].mlp.train()
        fill_parameters(block, 1)
        made.append(block)
    mixed, plain = made
    x, info = torch.randn(TOKENS, HIDDEN), make_info(1, TOKENS, 32, training=True)
    upstream = torch.randn(TOKENS, HIDDEN)
    found = mixed(x, info)[0]
    assert torch.equal(found, plain(x, info)[0])
    (found * upstream).sum().backward()
    routing = plain.router(x, info)
    weight, chosen = dense_weights(routing), routing.choice_map()[:, :8]
    scores = routing.scores[:, :8]
    factor = weight.sum(1, keepdim=True) / (scores * chosen).sum(1, keepdim=True).clamp_min(1e-30)
    heard = torch.einsum("td,ted->te", upstream, every_output(x, plain.experts)).detach()
    wanted = ((torch.where(chosen, weight, scores * factor.detach())) * heard).sum()
    if routing.bypass is not None:
        wanted = wanted + (routing.bypass * upstream).sum()
    (gradient,) = torch.autograd.grad(wanted, plain.router.weight)
    torch.testing.assert_close(mixed.router.weight.grad, gradient, rtol=1e-3, atol=1e-5)
