"""One optimizer step: the split into micro-batches and padding must not matter; a NaN is located."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import moelab
from moelab.builder import build_balance_losses
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import OptimizerConfig
from moelab.data.batches import Batch
from moelab.errors import RunFailure
from moelab.moe.balance import NamedLoss
from moelab.nn.checkpointing import apply_activation_checkpointing
from moelab.nn.transformer import Transformer
from moelab.training.optimizer import build_adamw
from moelab.training.precision import Precision
from moelab.training.step import StepSettings, train_step

PRECISION = Precision(torch.device("cpu"), torch.float32)


def _config(router: dict[str, object], losses: list[dict[str, object]]) -> ModelConfig:
    moe = MoEConfig(
        layout={"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        router=router,
        shared_expert={"name": "gated", "intermediate_size": 24},
        balance_losses=losses,
    )
    return ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, moe=moe,
    )  # fmt: skip


SOFTMAX = _config(
    {"name": "softmax_topk"},
    [{"name": "load_balance", "weight": 0.5, "scope": "global"}, {"name": "router_z", "weight": 0.1}],
)
HF_LOSS = _config({"name": "softmax_topk"}, [{"name": "hf_load_balance", "weight": 0.5}])
LOSS_FREE = _config({"name": "sigmoid_topk"}, [])
# What losses count, and what the quantile bias is read off, are the whole batch's too.
GROUPED = _config(
    {"name": "sigmoid_topk", "n_group": 4, "topk_group": 2},
    [{"name": "load_balance", "weight": 0.5, "scope": scope} for scope in ("global", "sequence")],
)
QUANTILE = _config({"name": "sigmoid_topk", "balance": "quantile"}, [{"name": "hf_load_balance", "weight": 0.5}])
CONFIGS = {"softmax": SOFTMAX, "hf": HF_LOSS, "loss_free": LOSS_FREE, "grouped": GROUPED, "quantile": QUANTILE}


def _parts(config: ModelConfig) -> tuple[Transformer, list[NamedLoss], torch.optim.Optimizer]:
    registry = moelab.Registry(entry_points=False)
    model = moelab.build_model(config, registry, seed=1)
    # SGD: Adam's first step is the sign of the gradient and would hide a wrong scale.
    return model, build_balance_losses(config, registry), torch.optim.SGD(model.parameters(), lr=0.1)


def _batch(sequences: int = 8, length: int = 24) -> Batch:
    ids = torch.randint(0, 64, (sequences, length + 1), generator=torch.Generator().manual_seed(3))
    same = torch.arange(sequences)[:, None].expand(sequences, length).contiguous()
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), same, torch.zeros_like(same))


def _after(
    config: ModelConfig, batch: Batch, micro_batch_size: int
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    model, losses, optimizer = _parts(config)
    settings = StepSettings(micro_batch_size, 0.0, 0, PRECISION)
    result = train_step(model, optimizer, losses, batch, 0, settings)
    return copy.deepcopy(dict(model.state_dict())), {k: float(v) for k, v in result.losses.items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_the_split_into_micro_batches_does_not_change_the_update(config: ModelConfig, micro_batch_size: int) -> None:
    whole, whole_losses = _after(config, _batch(), 8)
    split, split_losses = _after(config, _batch(), micro_batch_size)
    for name, tensor in whole.items():
        assert torch.allclose(tensor, split[name], atol=2e-6), name  # the order of fp32 sums differs
    for name, value in whole_losses.items():
        assert value == pytest.approx(split_losses[name], abs=1e-5), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("micro_batch_size", [2, 8])
def test_padding_on_the_right_does_not_change_the_update(config: ModelConfig, micro_batch_size: int) -> None:
    plain, (pad, length) = _batch(), (9, 24)

    def padded(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, pad), value=value)

    mask = padded(torch.ones(8, length, dtype=torch.long), 0).bool()
    longer = Batch(
        padded(plain.input_ids, 5), padded(plain.targets, -100), padded(plain.document_id, 0),
        padded(plain.domain_id, 0), mask,
    )  # fmt: skip
    without, losses = _after(config, plain, 8)
    with_padding, padded_losses = _after(config, longer, micro_batch_size)
    for name, tensor in without.items():
        assert torch.allclose(tensor, with_padding[name], atol=2e-6), name
    for name, value in losses.items():
        assert value == pytest.approx(padded_losses[name], abs=1e-5), name


def test_activation_checkpointing_does_not_change_the_update() -> None:
    plain, _ = _after(LOSS_FREE, _batch(), 4)
    model, losses, optimizer = _parts(LOSS_FREE)
    apply_activation_checkpointing(model)
    train_step(model, optimizer, losses, _batch(), 0, StepSettings(4, 0.0, 0, PRECISION))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain[name]), name


def test_the_total_is_the_sum_of_the_weighted_parts() -> None:
    _, losses = _after(SOFTMAX, _batch(), 8)
    expected = losses["lm_loss"] + 0.5 * losses["load_balance"] + 0.1 * losses["router_z"]
    assert losses["loss"] == pytest.approx(expected, abs=1e-5)


def test_gradients_are_clipped_to_the_norm_asked_for() -> None:
    model, losses, optimizer = _parts(SOFTMAX)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_step(model, optimizer, losses, _batch(), 0, StepSettings(8, 0.01, 0, PRECISION))
    moved = sum(float(((p.detach() - before[n]) / 0.1).square().sum()) for n, p in model.named_parameters()) ** 0.5
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_gradients_within_the_norm_stay_as_they_are_and_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[float] = []
    monkeypatch.setattr("torch.nn.utils.clip_grads_with_norm_", lambda gradients, most, norm: passes.append(most))
    for most in (1e3, 1e-3):
        model, losses, optimizer = _parts(SOFTMAX)
        train_step(model, optimizer, losses, _batch(), 0, StepSettings(8, most, 0, PRECISION))
    assert passes == [1e-3]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_nan_is_found_in_its_layer_and_nothing_is_updated(layer: int) -> None:
    model, losses, optimizer = _parts(SOFTMAX)
    block = model.get_submodule(f"layers.{layer}.mlp")
    block.register_forward_hook(lambda module, inputs, output: (output[0] * float("nan"), output[1]))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RunFailure, match=rf"step 7.*layer {layer} \(mlp\)"):
        train_step(model, optimizer, losses, _batch(), 7, StepSettings(8, 1.0, 0, PRECISION))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_nan_that_is_only_in_a_gradient_is_found_where_it_arose(layer: int, grad_clip: float) -> None:
    model, losses, optimizer = _parts(SOFTMAX)
    router = model.get_submodule(f"layers.{layer}.mlp.router")
    next(router.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(RunFailure, match=rf"the gradient of layers\.{layer}\.mlp\.router\.weight"):
        train_step(model, optimizer, losses, _batch(), 3, StepSettings(4, grad_clip, 0, PRECISION))


def test_a_balance_loss_that_is_no_number_is_named() -> None:
    model, losses, optimizer = _parts(SOFTMAX)
    guilty = losses[1]
    broken = dataclasses.replace(guilty, loss=_Broken())
    with pytest.raises(RunFailure, match=rf"step 5; it first appears in the value of {guilty.name}\."):
        train_step(model, optimizer, [losses[0], broken], _batch(), 5, StepSettings(4, 1.0, 0, PRECISION))


class _Broken:
    weight, needs_batch_counts = 0.1, False

    def __call__(self, records: object, context: object) -> torch.Tensor:
        return torch.tensor(float("inf"))


def test_an_adamw_step_lowers_the_loss_of_its_batch() -> None:
    model, losses, _ = _parts(SOFTMAX)
    optimizer = build_adamw(model, OptimizerConfig(lr=3e-3))
    settings = StepSettings(4, 1.0, 0, PRECISION)
    first, *_, last = [
        float(train_step(model, optimizer, losses, _batch(), s, settings).losses["loss"]) for s in range(8)
    ]
    assert last < first - 0.5


def test_a_step_without_a_balance_loss_counts_nothing_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A biased router's best scores are searched for when a loss asks, and not before."""

    def refuse(routing: object) -> None:
        raise AssertionError("counted for nobody")

    monkeypatch.setattr(moelab.Routing, "balance_map", property(refuse))
    model, losses, optimizer = _parts(LOSS_FREE)
    train_step(model, optimizer, losses, _batch(), 0, StepSettings(4, 0.0, 0, PRECISION))


def test_a_router_is_told_the_step_if_it_asks() -> None:
    """So a schedule needs no state: step 5 of a resumed run is step 5."""
    router = {"name": "sigmoid_topk", "bias_centred": False, "bias_schedule": {"decay_from": 4, "decay_to": 8}}
    scheduled = _config(router, [])
    for step, rate in ((0, 1e-3), (5, 0.75e-3), (8, 0.0)):
        model, losses, optimizer = _parts(scheduled)
        train_step(model, optimizer, losses, _batch(), step, StepSettings(8, 0.0, 0, PRECISION))
        moved = model.get_submodule("layers.0.mlp.router").bias.abs().max()
        assert float(moved) == pytest.approx(rate)
