"""A NaN is told with the place where it arose: parameter, expert, layer, loss, forward or backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moelab
from moelab.builder import build_balance_losses
from moelab.config.model import ModelConfig, MoEConfig
from moelab.data.batches import Batch
from moelab.moe.balance import NamedLoss
from moelab.nn.transformer import Transformer
from moelab.training.failure import NotFinite, check_evaluation
from moelab.training.precision import Precision
from moelab.training.step import StepSettings, train_step

NAN = float("nan")


def _model(router: str = "softmax_topk") -> tuple[Transformer, list[NamedLoss]]:
    moe = MoEConfig(
        layout={"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        router={"name": router}, shared_expert={"name": "gated", "intermediate_size": 8},
        backend={"name": "grouped_mm"}, balance_losses=[{"name": "load_balance"}, {"name": "router_z"}],
    )  # fmt: skip
    config = ModelConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3, moe=moe,
    )  # fmt: skip
    registry = moelab.Registry(entry_points=False)
    return moelab.build_model(config, registry, seed=1), build_balance_losses(config, registry)


def _told(model: Transformer, losses: list[NamedLoss], step: int = 5, micro_batch_size: int = 2) -> str:
    ids = torch.randint(0, 64, (4, 13), generator=torch.Generator().manual_seed(3))
    zeros = torch.zeros(4, 12, dtype=torch.int64)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), zeros, zeros)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = StepSettings(micro_batch_size, 1.0, 0, Precision(torch.device("cpu"), torch.float32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NotFinite) as caught:
        train_step(model, optimizer, losses, batch, step, settings)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), f"{name} was updated"
    return str(caught.value)


def test_an_expert_of_a_stacked_weight_is_named() -> None:
    model, losses = _model()
    with torch.no_grad():
        model.get_parameter("layers.1.mlp.experts.down")[3, 2, 1] = NAN
    assert "the parameter layers.1.mlp.experts.down, expert 3, which the update before made so" in _told(model, losses)


def test_an_expert_whose_output_overflows_is_named() -> None:
    """Its weights are finite; the product is not."""
    model, losses = _model()
    with torch.no_grad():
        for name in ("gate_up", "down"):
            model.get_parameter(f"layers.1.mlp.experts.{name}")[2] = 1e30
    assert "first appears in the output of the experts of layer 1, expert 2. No update was made" in _told(model, losses)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("embed_tokens", "the output of embed_tokens"),
        ("layers.0.self_attn", "the output of layer 0 (attention)"),
        (
            "layers.1.mlp.shared_expert",
            "shared expert 'gated' of moelab_plugins.shared_experts.gated, layer 1",
        ),
        ("norm", "the output of norm"),
    ],
)
def test_a_layer_is_named(module: str, words: str) -> None:
    model, losses = _model()
    model.get_submodule(module).register_forward_hook(lambda module, inputs, output: output * NAN)
    assert words in _told(model, losses)


def test_a_router_is_named_with_what_it_returned() -> None:
    model, losses = _model()

    def spoil(module: nn.Module, inputs: Any, routing: moelab.Routing) -> moelab.Routing:
        return dataclasses.replace(routing, logits=None if routing.logits is None else routing.logits * NAN)

    router = model.get_submodule("layers.0.mlp.router")
    model.get_submodule("layers.0.mlp").believe()  # type: ignore[operator]  # it was looked at in a good step
    router.register_forward_hook(spoil)
    words = "the output of router 'softmax_topk' of moelab_plugins.routers.softmax_topk, layer 0 (logits)"
    assert words in _told(model, losses)


def _spoilt(named: NamedLoss, change: Callable[[Tensor], Tensor], **members: Any) -> NamedLoss:
    class Spoilt:
        weight, needs_batch_counts = members.get("weight", 0.1), False

        def __call__(self, records: Any, context: Any) -> Tensor:
            return change(named.loss(records, context))

    return dataclasses.replace(named, loss=Spoilt())


def test_a_loss_is_named_by_its_value() -> None:
    model, losses = _model()
    losses[1] = _spoilt(losses[1], lambda value: value / 0)
    assert "it first appears in the value of router_z. No" in _told(model, losses)


def test_a_loss_is_named_by_its_gradient() -> None:
    """The square root of zero is zero, and its slope is endless."""
    model, losses = _model()
    losses[0] = _spoilt(losses[0], lambda value: value + (value - value.detach()).abs().sqrt())
    told = _told(model, losses)
    assert "the gradient of layers.1.mlp.router.weight, by load_balance. No" in told
    assert told.endswith("To go on, lower the weight of load_balance, or mend it")


def test_a_coefficient_is_named() -> None:
    model, losses = _model()
    losses[0] = _spoilt(losses[0], lambda value: value, weight=float("inf"))
    assert "it first appears in the coefficient of load_balance. No" in _told(model, losses)


def test_the_noise_is_that_of_the_failing_step() -> None:
    """A router that fails for some draws alone is found, in whatever micro-batch."""
    model, losses = _model("noisy_topk")
    block = model.get_submodule("layers.1.mlp")
    seeds: list[int] = []

    def spoil(module: nn.Module, inputs: Any, output: Any) -> Any:
        seeds.append(inputs[1].generator.initial_seed())
        return (output[0] * NAN, output[1]) if len(set(seeds)) == 2 and seeds[-1] != seeds[0] else output

    block.register_forward_hook(spoil)
    assert "the output of layer 1 (mlp)" in _told(model, losses)


def test_a_held_out_loss_that_is_no_number_names_the_parameter() -> None:
    model, _ = _model()
    check_evaluation(model, 2.0, 3)
    with torch.no_grad():
        model.get_parameter("layers.0.mlp.router.weight")[0] = NAN
    with pytest.raises(NotFinite, match=r"held-out loss is NaN or Inf after step 3; .* layers\.0\.mlp\.router\.weight"):
        check_evaluation(model, NAN, 3)
