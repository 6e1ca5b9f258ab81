"""TRL's trainers over the adapter: what they compute is what they compute of transformers' own class."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl", reason="needs TRL: pip install 'moelab[align]'")
import moelab  # noqa: E402
from moelab.builder import build_balance_losses  # noqa: E402
from moelab.hf.names import pieces  # noqa: E402
from moelab.moe.batch_statistics import BatchStatistics  # noqa: E402
from moelab.registry import Registry  # noqa: E402
from optional.alignment_cases import (  # noqa: E402 (it imports datasets)
    PAIRS,
    ROUTERS,
    adapted,
    built,
    byte_tokenizer,
    first_batch,
    pairs,
    quiet,
)
from parity.reference import MOE, reference_model  # noqa: E402

EXACT = 1e-6


def _both(folder: Path) -> list[Any]:
    """One Qwen2-MoE as transformers' own class and through the adapter."""
    reference = reference_model(MOE | {"vocab_size": 260})
    reference.save_pretrained(folder)
    return [reference, moelab.as_transformers(moelab.load(folder))]


def _dpo(model: Any, reference: Any, folder: Path, **more: Any) -> Any:
    args = quiet(trl.DPOConfig, folder, router_aux_loss_coef=0.0, **more)
    return trl.DPOTrainer(
        model, reference, args=args, train_dataset=pairs(), processing_class=byte_tokenizer()
    )  # fmt: skip


def _sft(model: Any, folder: Path, **more: Any) -> Any:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    args = quiet(trl.SFTConfig, folder, router_aux_loss_coef=0.0, shuffle_dataset=False, **more)
    return trl.SFTTrainer(model, args=args, train_dataset=pairs(rows), processing_class=byte_tokenizer())


def _loss(trainer: Any) -> torch.Tensor:
    trainer.model.train()
    trainer.model.zero_grad()
    loss: torch.Tensor = trainer.compute_loss(trainer.model, first_batch(trainer))
    loss.backward()
    return loss.detach()


def _gradients_agree(theirs: Any, ours: Any) -> None:
    """Each tensor of ours against theirs, to 1e-5 of the largest entry of any."""
    found = {name: p.grad for name, p in theirs.named_parameters()}
    scale = max(float(g.abs().max()) for g in found.values())
    for name, parameter in ours.model.named_parameters():
        (piece,) = pieces(name, tuple(parameter.shape), fused=True)
        assert float((piece.view(parameter.grad) - found.pop(piece.name)).abs().max()) <= 1e-5 * scale, piece.name
    assert not found


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_losses_and_gradients_are_those_of_transformers_own_class(stage: str, tmp_path: Path) -> None:
    models = _both(tmp_path / "model")
    if stage == "sft":
        trainers = [_sft(model, tmp_path / "out") for model in models]
    else:  # the policy has moved away from its reference, so that no term of the loss vanishes
        trainers = [
            _dpo(model, ref, tmp_path / "out") for model, ref in zip(models, _both(tmp_path / "other"), strict=True)
        ]
        for trainer, name in zip(trainers, ("model.norm.weight", "model.norm.weight"), strict=True):
            with torch.no_grad():
                trainer.model.get_parameter(name).mul_(1.3)
    losses = [_loss(trainer) for trainer in trainers]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    if stage == "dpo":
        assert abs(float(losses[0]) - math.log(2)) > 1e-3
    _gradients_agree(trainers[0].model, trainers[1].model)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_a_policy_that_is_its_reference_has_a_loss_of_ln_2_and_no_margin(
    router: dict[str, Any], tmp_path: Path
) -> None:
    trainer = _dpo(*adapted(router), tmp_path)
    assert abs(float(_loss(trainer)) - math.log(2)) < EXACT
    assert abs(trainer._metrics["train"]["rewards/margins"][-1]) < EXACT


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_padding_changes_no_log_probability(router: dict[str, Any], tmp_path: Path) -> None:
    """Each pair alone, all together, and all padded to 64 tokens: the same sums of log-probabilities."""
    policy, _ = adapted(router, seed=1)
    found = []
    for multiple in (None, 64):
        trainer = _dpo(policy, adapted(router)[1], tmp_path, pad_to_multiple_of=multiple)
        rows = [trainer.train_dataset[i] for i in range(len(PAIRS))]
        for batch in ([rows], [[row] for row in rows]):
            sums = []
            for part in batch:
                trainer.compute_loss(trainer.model, trainer.data_collator(part))
                sums.append(trainer._metrics["train"]["logps/chosen"][-1])
            found.append(sum(sums) / len(sums))
    assert max(found) - min(found) < EXACT * abs(found[0])


class Dpo(moelab.RoutedTrainer, trl.DPOTrainer):
    """DPO with our balance losses."""


class Sft(moelab.RoutedTrainer, trl.SFTTrainer):
    """SFT with our balance losses."""


LOSSES = [{"name": "load_balance", "weight": 0.01}]


def _trained(folder: Path, accumulate: int, router: dict[str, Any]) -> tuple[Any, Any]:
    model = moelab.as_transformers(built(router, balance_losses=LOSSES))
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    args = quiet(
        trl.SFTConfig, folder, per_device_train_batch_size=4 // accumulate, gradient_accumulation_steps=accumulate,
        max_steps=3, learning_rate=0.0, max_grad_norm=0.0, shuffle_dataset=False,
    )  # fmt: skip
    trainer = Sft(model, args=args, train_dataset=pairs(rows), processing_class=byte_tokenizer())
    calls: list[int] = []
    layer = model.model.layers[0].mlp.router
    own = layer.after_step
    layer.after_step = lambda counts, *more, **told: (calls.append(int(counts.sum())), own(counts, *more, **told))
    gradients: dict[str, torch.Tensor] = {}

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer.add_callback(Keep())
    trainer.train()
    return (calls, gradients), trainer


def test_routers_step_once_for_each_optimizer_step_and_losses_do_not_hang_on_the_split(tmp_path: Path) -> None:
    router = {"name": "sigmoid_topk", "bias_update_rate": 0.0}
    (whole, expected), _ = _trained(tmp_path / "a", 1, router)
    (split, found), trainer = _trained(tmp_path / "b", 4, router)
    assert len(whole) == len(split) == 3 and whole == split  # asked for by the same tokens of the whole batch
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-5 * scale, name
    (row,) = [row for row in trainer.state.log_history if row.get("step") == 1 and "loss" in row]
    assert {"load_balance", "moe/mean/max_violation", "moe/layer_00/router_entropy"} <= row.keys()


def test_a_trainer_that_was_stopped_goes_on_exactly_its_losses_and_biases_too(tmp_path: Path) -> None:
    """By transformers' own resuming: a router's bias is in the weights, a balance loss's coefficient beside them."""
    router = {"name": "remoe"}
    losses = [{"name": "remoe_l1"}]
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]

    def run(folder: Path, resume: bool) -> tuple[dict[str, torch.Tensor], float]:
        model = moelab.as_transformers(built(router, balance_losses=losses))
        args = quiet(
            trl.SFTConfig, folder, max_steps=4, learning_rate=1e-3, save_strategy="steps", save_steps=2,
            per_device_train_batch_size=2,
        )  # fmt: skip
        trainer = Sft(model, args=args, train_dataset=pairs(rows), processing_class=byte_tokenizer())
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
        return {n: p.detach().clone() for n, p in model.state_dict().items()}, trainer.routes.balance_losses[
            0
        ].loss.weight

    whole, coefficient = run(tmp_path, False)
    again, same = run(tmp_path, True)
    assert (
        coefficient
        == same
        != build_balance_losses(built(router, balance_losses=losses).config, Registry())[0].loss.weight
    )
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_the_balance_loss_is_ours_and_trls_pooled_one_is_not_there(tmp_path: Path) -> None:
    """Gradients with it less those without are the balance loss's own, over tokens that are no padding."""
    found = []
    for losses in (None, ()):
        policy, reference = (moelab.as_transformers(built(ROUTERS["softmax"], balance_losses=LOSSES)) for _ in "ab")
        args = quiet(
            trl.DPOConfig, tmp_path, max_steps=1, learning_rate=0.0, max_grad_norm=0.0, gradient_checkpointing=False
        )
        trainer = Dpo(
            policy, reference, args=args, train_dataset=pairs(), processing_class=byte_tokenizer(),
            balance_losses=losses,
        )  # fmt: skip
        assert not trainer.aux_loss_enabled
        kept: dict[str, torch.Tensor] = {}

        class Keep(transformers.TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, into: Any = kept, of: Any = policy, **kwargs: Any) -> None:
                into.update({name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None})

        trainer.add_callback(Keep())
        trainer.train()
        found.append(kept)
    batch = first_batch(trainer)
    alone = built(ROUTERS["softmax"], balance_losses=LOSSES)
    (named,) = build_balance_losses(alone.config, Registry())
    records = alone.train()(batch["input_ids"], batch["attention_mask"], head=False).records
    counts = BatchStatistics([named])
    counts.add(records)
    (0.01 * named(records, counts.context(named))).backward()
    for name, parameter in alone.named_parameters():
        if "router" in name:
            difference = found[0][f"model.{name}"] - found[1][f"model.{name}"]
            torch.testing.assert_close(difference, parameter.grad, atol=1e-7, rtol=1e-3)
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert row["moe/mean/route_agreement"] == 1.0  # the policy is its reference yet
    assert 0 < row["moe/mean/chosen_rejected_load"] < 1
