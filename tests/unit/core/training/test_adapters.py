"""Adapters are LoRA: by a float64 reference, from the weights they begin with to those that every reader sees."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

import moelab
from moelab.builder import build_balance_losses, build_model
from moelab.checkpoint import newest_checkpoint
from moelab.config.adapters import AdapterConfig
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import DataConfig, EvaluationConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from moelab.config.stages import StageConfig
from moelab.data.batches import Batch
from moelab.errors import CheckpointError, ConfigError
from moelab.nn.low_rank import adapter_targets
from moelab.planning.memory import predict
from moelab.planning.traffic import Problem
from moelab.training.adapters import Adapters, attach
from moelab.training.optimizer import build_adamw
from moelab.training.precision import Precision
from moelab.training.step import Observe, StepSettings, train_step
from moelab.training.trainer import train
from moelab_tools.cli import run as run_command

REGISTRY = moelab.Registry(entry_points=False)
LAYOUT = {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MOE = MoEConfig(
    layout=LAYOUT, shared_expert={"name": "gated", "intermediate_size": 8},
    balance_losses=[{"name": "load_balance", "weight": 0.01}],
)  # fmt: skip
MODEL = ModelConfig(
    vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, initializer_range=0.2, max_position_embeddings=64, tie_word_embeddings=True, moe=MOE,
)  # fmt: skip
EVERYWHERE = [
    AdapterConfig("layers.*.mlp.experts.*", r=2, alpha=6.0),
    AdapterConfig("*.router.weight", r=3, alpha=3.0, init="gaussian"),
    AdapterConfig("layers.1.self_attn.*.weight", r=4),
    AdapterConfig("*.shared_expert.*.weight", r=1),
]
SETTINGS = StepSettings(4, 0.0, 0, Precision(torch.device("cpu"), torch.float32))


def a_batch(step: int = 0, sequences: int = 4) -> Batch:
    ids = torch.randint(0, 300, (sequences, 12), generator=torch.Generator().manual_seed(step))
    return Batch(ids, ids.roll(-1, 1), torch.zeros_like(ids), torch.zeros_like(ids))


def adapted(chosen: list[AdapterConfig], model: ModelConfig = MODEL) -> tuple[Any, Adapters]:
    """In float64, every factor of the adapters other than zero."""
    built = build_model(model, REGISTRY, seed=1).double()
    adapters = attach(built, chosen, 7)
    assert adapters is not None
    stream = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapter in adapters.each():
            adapter.lora_b.copy_(torch.empty(adapter.lora_b.shape).normal_(0, 0.1, generator=stream))
    adapters.merge()
    return built, adapters


def reference_weight(base: Tensor, a: Tensor, b: Tensor, scale: float, name: str) -> Tensor:
    """W + (alpha / r) B A, expert by expert; of `down`, which is stored as [in, out], its transpose."""
    if base.ndim == 2:
        return base + scale * b @ a
    if name.endswith("down"):
        return torch.stack([w + scale * (y.T @ x.T).T for w, x, y in zip(base, a, b, strict=True)])
    return torch.stack([w + scale * y @ x for w, x, y in zip(base, a, b, strict=True)])


def test_training_steps_are_those_of_low_rank_factors_under_autograd_in_float64() -> None:
    model, adapters = adapted(EVERYWHERE)
    twin = build_model(MODEL, REGISTRY, seed=1).double()
    bases = {name: parameter.detach() for name, parameter in twin.named_parameters()}
    leaves: dict[str, dict[str, Any]] = {}
    for name, adapter in ((n, m) for n, m in adapters.named_modules() if hasattr(m, "lora_a")):
        a, b = adapter.lora_a.detach().clone(), adapter.lora_b.detach().clone()
        leaves[name] = {"a": a.requires_grad_(), "b": b.requires_grad_(), "scale": adapter.scale}
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1)
    ours = build_adamw(adapters, config)
    adapters.follow(ours)
    values = [leaf[key] for leaf in leaves.values() for key in ("a", "b")]
    theirs = torch.optim.AdamW(values, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses = build_balance_losses(MODEL, REGISTRY)
    twin.train()
    for step in range(3):
        result = train_step(model, ours, losses, a_batch(step), step, SETTINGS, adapters=adapters)
        merged = bases | {n: reference_weight(bases[n], v["a"], v["b"], v["scale"], n) for n, v in leaves.items()}
        theirs.zero_grad()
        batch = a_batch(step)
        output = functional_call(twin, merged, (batch.input_ids,), {"targets": batch.targets}, tie_weights=True)
        loss = output.token_loss.mean()
        torch.testing.assert_close(result.losses["lm_loss"], loss.detach(), rtol=1e-9, atol=1e-9)
        scalars = [named(output.records, _counts(losses, output).context(named)) for named in losses]
        (loss + sum(0.01 * value for value in scalars)).backward()
        norm = torch.stack([value.grad.norm() for value in values]).norm()
        torch.testing.assert_close(result.grad_norm, norm, rtol=1e-8, atol=1e-10)
        theirs.step()
    after = dict(model.named_parameters())
    for name, v in leaves.items():
        wanted = reference_weight(bases[name], v["a"], v["b"], v["scale"], name).detach()
        torch.testing.assert_close(after[name].detach(), wanted, rtol=1e-7, atol=1e-9)
    still = {name for name, value in after.items() if torch.equal(value, bases[name])}
    assert still == after.keys() - leaves.keys()


def _counts(losses: Any, output: Any) -> Any:
    from moelab.moe.batch_statistics import BatchStatistics

    counts = BatchStatistics(losses)
    counts.add(output.records)
    return counts


def test_micro_batches_add_up_to_the_step_of_the_whole_batch() -> None:
    found = []
    for micro in (4, 1):
        model, adapters = adapted(EVERYWHERE)
        settings = dataclasses.replace(SETTINGS, micro_batch_size=micro)
        optimizer = build_adamw(adapters, OptimizerConfig())
        train_step(model, optimizer, [], a_batch(), 0, settings, adapters=adapters)
        found.append({name: parameter.grad for name, parameter in adapters.named_parameters()})
        assert all(parameter.grad is None for parameter in model.parameters())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)


def test_b_begins_at_zero_so_the_model_is_the_base_to_the_bit() -> None:
    base = build_model(MODEL, REGISTRY, seed=1)
    model = build_model(MODEL, REGISTRY, seed=1)
    adapters = attach(model, EVERYWHERE, 0)
    assert adapters is not None
    adapters.merge()
    for (name, ours), theirs in zip(model.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    ids = a_batch().input_ids
    assert torch.equal(model(ids).logits, base(ids).logits)
    for name, one in ((n, m) for n, m in adapters.named_modules() if hasattr(m, "lora_a")):
        assert not one.lora_b.any(), name
        inputs = one.lora_a.shape[-2] if name.endswith("down") else one.lora_a.shape[-1]
        largest = float(one.lora_a.detach().abs().max())
        assert largest > 0 and (largest <= inputs**-0.5 or "router" in name), name


def test_neurons_that_even_out_widths_stay_zero() -> None:
    layout = {"name": "heterogeneous", "widths": [8, 4], "num_experts": 4, "num_experts_per_tok": 2}
    moe = dataclasses.replace(MOE, layout=layout)
    model = build_model(dataclasses.replace(MODEL, moe=moe, activation={"name": "gelu"}), REGISTRY, seed=1)
    adapters = attach(model, EVERYWHERE, 0)
    assert adapters is not None
    optimizer = build_adamw(adapters, OptimizerConfig(lr=1e-2))
    adapters.follow(optimizer)
    for step in range(3):
        train_step(model, optimizer, [], a_batch(step), step, SETTINGS, adapters=adapters)
    for layer in model.layers:
        bank: Any = layer.mlp.experts
        assert not bank.down[1::2, 4:].any()
        assert not bank.gate_up[1::2, 4:].any()


def test_a_router_that_learns_through_adapters_is_measured_by_their_gradient() -> None:
    model, adapters = adapted([EVERYWHERE[1]])
    optimizer = build_adamw(adapters, OptimizerConfig())
    result = train_step(model, optimizer, [], a_batch(), 0, SETTINGS, observe=Observe(True, False), adapters=adapters)
    assert result.router_norms is not None
    torch.testing.assert_close(result.router_norms.norm().double(), result.grad_norm.double(), rtol=1e-6, atol=0)


# A run, from its start to who reads it.


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A config whose weights are another run's."""
    folder = tmp_path_factory.mktemp("adapters")
    data = folder / "a.jsonl"
    data.write_text("".join(json.dumps({"text": f"document {n} says {n * n} " * 8}) + "\n" for n in range(20)))
    config = RunConfig(
        run_dir=str(folder / "base"),
        model=MODEL,
        data=DataConfig(source={"name": "jsonl", "paths": [str(data)]}, validation_fraction=0.2),
        train=TrainConfig(steps=1, batch_size=2, sequence_length=16),
        optimizer=OptimizerConfig(lr=1e-2),
        evaluation=EvaluationConfig(sequences=4, sample_tokens=0),
        observers=[],
    )
    base = train(config)
    config.train = dataclasses.replace(config.train, steps=4, init_from=str(base), adapters=EVERYWHERE)
    config.run_dir = str(folder / "adapted")
    train(config)
    return config


def tensors_of(run: Path | str) -> dict[str, Tensor]:
    folder = newest_checkpoint(Path(run))
    assert folder is not None
    return {name: t for file in ("model", "training") for name, t in load_file(folder / f"{file}.safetensors").items()}


def test_a_run_moves_what_it_adapts_by_the_rank_and_nothing_else(started: RunConfig) -> None:
    assert started.train.init_from is not None
    before, after = tensors_of(started.train.init_from), tensors_of(started.run_dir)
    targets = {target.name: target for target in adapter_targets(build_model(MODEL, REGISTRY), EVERYWHERE)}
    for name in before:
        if name.startswith(("optimizer/", "balance_losses/")):
            continue
        if name not in targets:
            assert torch.equal(before[name], after[name]), name
            continue
        target, moved = targets[name], (after[name].double() - before[name].double())
        assert torch.equal(after[f"adapters/{name}.base"], before[name])
        sizes = torch.linalg.svdvals(moved)  # of rank r, but for the rounding of the sum
        assert bool((sizes[..., 0] > 1e-4).any()), name
        assert float(sizes[..., target.config.r :].sum()) < 1e-5, name
        a, b = (after[f"adapters/{name}.lora_{key}"].double() for key in "ab")
        scale = target.config.alpha / target.config.r
        wanted = reference_weight(before[name].double(), a, b, scale, name)
        torch.testing.assert_close(after[name].double(), wanted, rtol=0, atol=1e-6)
    moments = {name.split("/")[1] for name in after if name.startswith("optimizer/")}
    assert moments == {f"{name}.lora_{key}" for name in targets for key in "ab"}


def test_resumed_it_is_the_same_to_the_bit(started: RunConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(started, run_dir=str(tmp_path / "halves"))
    config.train = dataclasses.replace(started.train, save_every=2, keep_checkpoints=0)
    run = train(config)
    shutil.rmtree(run / "checkpoints/step_00000004")
    config.resume = True
    config.train = dataclasses.replace(config.train, init_from=str(tmp_path / "gone"))
    train(config)
    whole, halves = tensors_of(started.run_dir), tensors_of(run)
    assert whole.keys() == halves.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, halves[name]), name


def test_in_a_run_of_stages_they_go_on_across_the_border_stopped_or_not(started: RunConfig, tmp_path: Path) -> None:
    """The same factors and moments learn on the longer text; what isn't adapted stays the base's to the bit."""
    config = dataclasses.replace(started, run_dir=str(tmp_path / "staged"), resume=False)
    config.train = dataclasses.replace(started.train, save_every=1, keep_checkpoints=0)
    config.stages = [
        StageConfig("short", 2, sequence_length=8, rope_theta=1e4, max_position_embeddings=8),
        StageConfig("long", sequence_length=16, rope_theta=1e6, max_position_embeddings=64),
    ]
    config.train.init_overrides = ["model.rope_theta"]
    config.check()
    run = train(config)
    whole, border = tensors_of(run), load_file(run / "checkpoints/step_00000002/model.safetensors")
    base = load_file(newest_checkpoint(Path(str(started.train.init_from))) / "model.safetensors")
    targets = {target.name for target in adapter_targets(build_model(MODEL, REGISTRY), EVERYWHERE)}
    for name in base:
        assert torch.equal(whole[name], border[name]) == (name not in targets), name
        assert name in targets or torch.equal(whole[name], base[name]), name
    for left in (2, 3):
        again = tmp_path / f"from_{left}"
        shutil.copytree(run, again)
        (again / "summary.json").unlink()
        for step in range(left + 1, config.train.steps + 1):
            shutil.rmtree(again / f"checkpoints/step_{step:08d}")
        resumed = dataclasses.replace(config, run_dir=str(again), resume=True)
        for name, tensor in tensors_of(train(resumed)).items():
            assert torch.equal(tensor, whole[name]), (left, name)


def test_every_reader_sees_the_merged_weights(started: RunConfig, tmp_path: Path) -> None:
    loaded = moelab.load(started.run_dir)
    stored = tensors_of(started.run_dir)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter.detach(), stored[name]), name
    ids = a_batch().input_ids
    assert run_command(["export", started.run_dir, str(tmp_path / "exported"), "--dtype", "float32"]) == 0
    with torch.no_grad():
        torch.testing.assert_close(
            moelab.load(tmp_path / "exported")(ids).logits, loaded(ids).logits, rtol=0, atol=1e-6
        )
    again = dataclasses.replace(started, run_dir=str(tmp_path / "again"))
    again.train = dataclasses.replace(started.train, steps=1, init_from=started.run_dir, adapters=[])
    summary = json.loads((train(again) / "summary.json").read_text())
    assert summary["status"] == "finished"
    told = json.loads((Path(started.run_dir) / "summary.json").read_text())["adapters"]
    targets = adapter_targets(build_model(MODEL, REGISTRY), EVERYWHERE)
    assert told == {"trained": sum(target.numbers for target in targets)}


def test_a_checkpoint_without_one_of_its_adapters_is_refused(started: RunConfig) -> None:
    model = build_model(MODEL, REGISTRY)
    adapters = attach(model, EVERYWHERE, 0)
    assert adapters is not None
    with pytest.raises(CheckpointError, match=r"'layers\.0\.mlp\.experts\.down\.base' is missing"):
        adapters.restore({"layers.0.mlp.experts.down.lora_a": torch.zeros(4, 8, 2)})  # type: ignore[dict-item]


def test_the_plan_counts_the_moments_of_the_adapters_alone() -> None:
    problem = Problem(2, 16, device="cpu", adapters=EVERYWHERE)
    whole, plan = predict(MODEL, dataclasses.replace(problem, adapters=())), predict(MODEL, problem)
    targets = adapter_targets(build_model(MODEL, REGISTRY), EVERYWHERE)
    numbers, adapted = sum(t.numbers for t in targets), sum(t.parameter.numel() for t in targets)
    assert plan.trained == numbers
    assert plan.memory.optimizer == 8 * numbers
    assert plan.memory.gradients == 4 * numbers
    assert plan.memory.parameters == whole.memory.parameters + 4 * (numbers + adapted)
    assert plan.memory.activations <= whole.memory.activations


REFUSED: dict[str, tuple[AdapterConfig, str]] = {
    "nothing": (AdapterConfig("*.rooter.*"), r"train.adapters.0.target: '\*.rooter.\*' matches no parameter"),
    "a vector": (AdapterConfig("layers.0.*"), r"train.adapters.0.target: .* matches layers.0.* which is no matrix"),
    "a rank": (AdapterConfig("*.router.weight", r=5), "train.adapters.0.r: 5 is above the rank that .* can have, 4"),
}


@pytest.mark.parametrize(("chosen", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_adapter_fits_is_refused(chosen: AdapterConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(build_model(MODEL, REGISTRY), [chosen], 0)


def test_biases_of_a_bank_are_no_matrices() -> None:
    moe = dataclasses.replace(MOE, shared_expert={"name": "none"})
    model = build_model(dataclasses.replace(MODEL, moe=moe, mlp_bias=True), REGISTRY)
    with pytest.raises(ConfigError, match=r"layers.0.mlp.experts.down_bias \[4, 16\], which is no matrix"):
        attach(model, [EVERYWHERE[0]], 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train": {"init_from": None}}, "train.adapters: .* no train.init_from"),
        ({"train": {"freeze": ["*.router.*"]}}, "train.freeze: says nothing beside train.adapters"),
        (
            {"train": {"parameters_dtype": "bfloat16", "dtype": "bfloat16"}},
            "train.adapters: adds to parameters of fp32",
        ),
        ({"train": {"adapters": [AdapterConfig("*", r=0)]}}, "train.adapters.0.r: must be at least 1"),
        ({"train": {"adapters": [AdapterConfig("*", alpha=0.0)]}}, "train.adapters.0.alpha: must be positive"),
        ({"train": {"adapters": [AdapterConfig("*", init="pissa")]}}, "train.adapters.0.init: must be one of kaiming"),
        ({"parallel": {"shard": 2}}, "train.adapters: is for one process, and parallel asks for 2"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(started: RunConfig, keys: dict[str, Any], message: str) -> None:
    config = dataclasses.replace(started)
    for section, changed in keys.items():
        holder = getattr(started, section) if section != "parallel" else ParallelConfig()
        setattr(config, section, dataclasses.replace(holder, **changed))
    with pytest.raises(ConfigError, match=message):
        config.check()


def test_the_rate_of_b_can_be_its_own() -> None:
    _, adapters = adapted(EVERYWHERE)
    groups = build_adamw(adapters, OptimizerConfig(learning_rates={"*.lora_b": 16.0})).param_groups
    factors = {id(parameter): group["factor"] for group in groups for parameter in group["params"]}
    for name, parameter in adapters.named_parameters():
        assert factors[id(parameter)] == (16.0 if name.endswith("lora_b") else 1.0), name
    assert isinstance(adapters, nn.Module)


def test_a_trained_router_that_is_frozen_raises_no_alarm_and_an_untrained_one_does(
    started: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(started, run_dir=str(tmp_path / "experts"))
    config.train = dataclasses.replace(started.train, steps=2, log_every=1, adapters=[EVERYWHERE[0]])
    summary = json.loads((train(config) / "summary.json").read_text())
    assert summary["alarms"] == []
    assert set(summary["frozen_routers"].values()) == {"train.adapters"}
    assert "no parameter of this router is trainable" in caplog.text
    fresh = dataclasses.replace(config, run_dir=str(tmp_path / "fresh"))
    fresh.train = dataclasses.replace(config.train, init_from=None, adapters=[], freeze=["*.router.*"])
    summary = json.loads((train(fresh) / "summary.json").read_text())
    assert {alarm["name"] for alarm in summary["alarms"]} == {"no_gradient"}
    assert set(summary["frozen_routers"].values()) == {"train.freeze"}
