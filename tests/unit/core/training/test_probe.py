"""The probe leaves no trace and costs nothing between looks; router numbers are closed forms of gradients, counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moelab
from moelab.alarms import NO_GRADIENT
from moelab.builder import build_balance_losses
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import TrainConfig
from moelab.data.batches import Batch
from moelab.moe.block import MoEBlock
from moelab.training.freeze import freeze
from moelab.training.precision import Precision
from moelab.training.probe import look
from moelab.training.router_gradient import frozen_by_config
from moelab.training.router_numbers import gradient_metrics, idle_metrics, layer_facts
from moelab.training.step import Observe, StepResult, StepSettings, train_step

REGISTRY = moelab.Registry(entry_points=False)
PRECISION = Precision(torch.device("cpu"), torch.float32)
SETTINGS = StepSettings(4, 0.0, 0, PRECISION)


def model_of(top_k: int = 2, **moe: Any) -> Any:
    layout = {"name": "uniform", "num_experts": 8, "num_experts_per_tok": top_k, "moe_intermediate_size": 16}
    parts = {"shared_expert": {"name": "gated", "intermediate_size": 24}, "balance_losses": [], **moe}
    config = ModelConfig(64, 32, 48, 2, 4, 2, initializer_range=0.2, moe=MoEConfig(layout=layout, **parts))
    return moelab.build_model(config, REGISTRY, seed=1)


def batch() -> Batch:
    ids = torch.randint(0, 64, (4, 25), generator=torch.Generator().manual_seed(3))
    same = torch.arange(4)[:, None].expand(4, 24).contiguous()
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), same, same % 2)


def blocks(model: nn.Module) -> list[MoEBlock]:
    return [module for module in model.modules() if isinstance(module, MoEBlock)]


def observed(model: Any, losses: list[Any] | None = None) -> StepResult:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return train_step(model, optimizer, losses or [], batch(), 0, SETTINGS, observe=Observe(True, True))


def test_norms_are_those_of_the_two_outputs_and_nothing_is_measured_unasked() -> None:
    model = model_of(router={"name": "softmax_topk"})
    first = blocks(model)[0]
    seen: list[Tensor] = []
    assert first.shared_expert is not None
    first.shared_expert.register_forward_hook(lambda module, inputs, output: seen.append(output))  # type: ignore[attr-defined]
    first.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    probe = look(model, batch(), ["a", "b"], PRECISION)
    shared, together = seen
    record = probe.records[0]
    assert torch.allclose(record.shared_norm, shared.norm(dim=-1))
    assert torch.allclose(record.routed_norm, (together - shared).norm(dim=-1), atol=1e-5)
    assert record.info is not None
    assert not record.info.training
    assert probe.token_id.tolist() == batch().input_ids.flatten().tolist()
    assert probe.domain_id.tolist() == batch().domain_id.flatten().tolist()
    plain = model(batch().input_ids).records[0]
    assert plain.routed_norm is None
    assert plain.shared_norm is None


@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_topk", "noisy_topk"])
def test_a_look_changes_no_later_step(name: str) -> None:
    """Bits of a step with a look before it are those of a step without."""
    results = []
    for looked in (False, True):
        model = model_of(router={"name": name}).train()
        if looked:
            look(model, batch(), ["a", "b"], PRECISION)
        assert model.training
        observed(model)
        results.append(dict(model.state_dict()))
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_a_step_that_is_not_logged_waits_for_the_device_no_more_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bool: whether the loss is finite; and the number of targets, which is counted on the host."""
    model = model_of(router={"name": "softmax_topk"}, balance_losses=[{"name": "load_balance"}])
    losses = build_balance_losses(model.config, REGISTRY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, optimizer, losses, batch(), 0, SETTINGS)  # the first call looks at values once
    waits: list[str] = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, *rest: Any, original: Any = original, name: str = name) -> Any:
            waits.append(name)
            return original(self, *rest)

        monkeypatch.setattr(Tensor, name, counted)
    train_step(model, optimizer, losses, batch(), 1, SETTINGS)
    assert [name for name in waits if name not in ("__bool__", "__int__")] == []
    assert waits.count("__bool__") == 1
    assert waits.count("__int__") == 1
    waits.clear()
    result = train_step(model, optimizer, losses, batch(), 2, SETTINGS, observe=Observe(True, True))
    assert [name for name in waits if name not in ("__bool__", "__int__")] == []  # gathered on the device
    gradient_metrics(model, blocks(model), result)
    assert "tolist" in waits


def test_the_ratio_is_of_root_mean_squares_and_shares_are_of_norms() -> None:
    losses_of = [{"name": "load_balance", "weight": 0.5}]
    model = model_of(router={"name": "softmax_topk"}, balance_losses=losses_of)
    result = observed(model, build_balance_losses(model.config, REGISTRY))
    gradients = [p.grad.double() for p in model.parameters() if p.grad is not None]
    whole = math.sqrt(sum(float(g.square().sum()) for g in gradients) / sum(p.numel() for p in model.parameters()))
    metrics = gradient_metrics(model, blocks(model), result)
    for block in blocks(model):
        weight: Any = block.router.weight  # type: ignore[attr-defined]
        prefix = f"moe/layer_{block.layer_id:02d}/"
        own = float(weight.grad.double().square().mean().sqrt())
        assert metrics[prefix + "router_gradient_ratio"] == pytest.approx(own / whole, rel=1e-4)
        assert metrics[prefix + "router_grad_norm"] == pytest.approx(float(weight.grad.norm()), rel=1e-5)
        text, balance = (float(result.gradient_norms[name][block.layer_id]) for name in ("lm_loss", "load_balance"))
        assert metrics[prefix + "text_gradient_share"] == pytest.approx(text / (text + balance))
    shares = [metrics[f"train/router_gradient_share/{name}"] for name in ("lm_loss", "load_balance")]
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize(
    ("top_k", "losses_of", "no_gradient", "text"),
    [
        (2, [], False, 1.0),
        (1, [], True, None),
        (1, [{"name": "load_balance", "weight": 0.5}], False, 0.0),
    ],
)
def test_a_router_without_gradient_is_told_from_one_that_balance_alone_teaches(
    top_k: int, losses_of: list[dict[str, Any]], no_gradient: bool, text: float | None
) -> None:
    router = {"name": "softmax_topk", "norm_topk_prob": True}
    model = model_of(top_k, router=router, balance_losses=losses_of)
    metrics = gradient_metrics(model, blocks(model), observed(model, build_balance_losses(model.config, REGISTRY)))
    for layer in (0, 1):
        ratio = metrics[f"moe/layer_{layer:02d}/router_gradient_ratio"]
        assert (ratio < NO_GRADIENT / 10) if no_gradient else (ratio > 100 * NO_GRADIENT)
        share = metrics.get(f"moe/layer_{layer:02d}/text_gradient_share")
        assert share is None if text is None else share == pytest.approx(text, abs=1e-4)


def test_a_router_by_design_has_no_gradient_to_tell_of() -> None:
    model = model_of(router={"name": "hash"})
    metrics = gradient_metrics(model, blocks(model), observed(model))
    assert not any("layer" in tag for tag in metrics)
    facts = layer_facts(blocks(model), untrained=True)
    assert [fact.learns for fact in facts.values()] == [False, False]
    assert layer_facts(blocks(model_of(router={"name": "softmax_topk"})), untrained=True)[1].learns


def test_only_a_router_that_the_config_froze_over_trained_weights_has_nothing_to_learn() -> None:
    """One that froze itself without a word, or by half, is to learn as before: what it does not learn is an alarm."""
    model = model_of(router={"name": "softmax_topk", "gate_bias": True})
    found, train = blocks(model), TrainConfig(steps=1, freeze=["layers.0.mlp.router.*", "layers.1.mlp.router.weight"])
    freeze(model, train.freeze)
    assert frozen_by_config(model, found, train) == {0: "train.freeze"}  # layer 1 has its bias left
    for parameter in found[1].router.parameters():  # type: ignore[union-attr]
        parameter.requires_grad_(False)
    frozen = frozen_by_config(model, found, train)
    assert frozen == {0: "train.freeze"}
    for untrained, to_learn in ((False, [False, True]), (True, [True, True])):
        facts = layer_facts(found, untrained=untrained, frozen=frozen)
        assert [fact.learns for fact in facts.values()] == to_learn


def test_idle_experts_are_counted_over_the_interval_where_chance_can_not_explain_them() -> None:
    found = blocks(model_of(router={"name": "softmax_topk"}))
    counts = [40, 0, 40, 40, 40, 40, 0, 40, *[1, 0, 2, 0, 0, 0, 0, 0]]
    assert idle_metrics(found, counts) == {"moe/layer_00/idle_fraction": 0.25}
    assert idle_metrics(found, []) == {}
