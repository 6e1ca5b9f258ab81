"""More of those who are handed the adapter: rewards, sampling trainers, LoRA on expert banks, pipelines, and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl", reason="needs TRL: pip install 'moelab[align]'")
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer  # noqa: E402

import moelab  # noqa: E402
from optional.alignment_cases import PAIRS, ROUTERS, adapted, built, byte_tokenizer, pairs, quiet  # noqa: E402

PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]


def short(completions: list[str], **said: Any) -> list[float]:
    """A reward for saying less."""
    return [-float(len(text)) for text in completions]


class Online(moelab.RoutedTrainer, OnlineDPOTrainer):
    """Pairs that the policy itself has sampled."""


class Grpo(moelab.RoutedTrainer, trl.GRPOTrainer):
    """Groups that the policy itself has sampled."""


class Reward(moelab.RoutedTrainer, trl.RewardTrainer):
    """A scalar head."""


def _moved(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def _copy(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["grpo", "online"])
def test_trainers_that_sample_train_every_part_and_log_its_routes(kind: str, tmp_path: Path) -> None:
    policy, reference = adapted({"name": "sigmoid_topk", "bias_update_rate": 0.01})
    more = {"max_steps": 2, "learning_rate": 1e-3, "temperature": 1.0}
    if kind == "grpo":
        args = quiet(trl.GRPOConfig, tmp_path, num_generations=4, max_completion_length=6, **more)
        trainer: Any = Grpo(
            policy, reward_funcs=short, args=args, train_dataset=pairs(PROMPTS), processing_class=byte_tokenizer()
        )  # fmt: skip
    else:
        args = quiet(OnlineDPOConfig, tmp_path, max_new_tokens=6, max_length=64, **more)
        trainer = Online(
            policy, reference, reward_funcs=short, args=args, train_dataset=pairs(PROMPTS),
            processing_class=byte_tokenizer(),
        )  # fmt: skip
    before = _copy(policy)
    biases = [layer.mlp.router.bias.clone() for layer in policy.model.layers]
    trainer.train()
    assert {name.rpartition(".")[2] for name in _moved(policy, before)} >= {"weight", "gate_up", "down"}
    moved = [
        (layer.mlp.router.bias - bias).abs().max() for layer, bias in zip(policy.model.layers, biases, strict=True)
    ]
    # Centred steps of at most the rate each, in both optimizer steps; and no third for what was sampled.
    assert all(0 < float(move) <= 2 * 2 * 0.01 for move in moved)
    assert any("moe/mean/max_violation" in row for row in trainer.state.log_history)


def test_a_reference_that_is_not_given_is_read_from_the_folder_of_the_policy(tmp_path: Path) -> None:
    """TRL builds it from the name in the policy's config, where DPO has none, and GRPO's beta asks for one."""
    adapted(ROUTERS["softmax"])[0].save_pretrained(tmp_path / "policy")
    policy = moelab.adapter.causal_lm.MoelabForCausalLM.from_pretrained(tmp_path / "policy")
    args = quiet(trl.GRPOConfig, tmp_path, num_generations=4, max_completion_length=4, beta=0.1, max_steps=1)
    trainer = Grpo(
        policy, reward_funcs=short, args=args, train_dataset=pairs(PROMPTS), processing_class=byte_tokenizer()
    )  # fmt: skip
    assert trainer.ref_model is not policy
    for name, parameter in trainer.ref_model.named_parameters():
        assert torch.equal(parameter, policy.get_parameter(name))


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_a_reward_learns_and_hangs_on_no_padding(router: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = moelab.as_classifier(built(router, balance_losses=[{"name": "load_balance", "weight": 0.01}]))
    args = quiet(trl.RewardConfig, tmp_path, max_steps=12, learning_rate=3e-3)
    trainer = Reward(model, args=args, train_dataset=pairs(), processing_class=tokenizer)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    with torch.no_grad():
        ids = torch.tensor([tokenizer.encode("a b")])
        alone = model(ids).logits
        padded = torch.cat([ids, torch.full((1, 5), 7)], 1)  # padding of any id, on any side
        for side in (padded, padded.roll(5, 1)):
            mask = (side != 7).long()
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            torch.testing.assert_close(model(side, attention_mask=mask, position_ids=positions).logits, alone)
    model.save_pretrained(tmp_path / "reward")
    moelab.register_with_transformers()
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    assert again.config.num_labels == 1
    torch.testing.assert_close(again(ids).logits, alone)


def test_lora_on_expert_banks_trains_them_alone_and_its_reference_is_the_model_without_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft accelerate")
    policy, _ = adapted(ROUTERS["softmax"])
    before = _copy(policy)
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up", "mlp.experts.down"], lora_dropout=0.0
    )

    class Dpo(moelab.RoutedTrainer, trl.DPOTrainer):
        pass

    args = quiet(trl.DPOConfig, tmp_path, max_steps=4, learning_rate=1e-2)
    trainer = Dpo(policy, args=args, train_dataset=pairs(), processing_class=byte_tokenizer(), peft_config=lora)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert abs(losses[0] - 0.693147) < 1e-4
    assert losses[-1] < losses[0]
    base = {name.replace(".base_layer", ""): p for name, p in policy.named_parameters() if "lora_" not in name}
    for name, old in before.items():
        kept = next(
            p for other, p in base.items() if other.endswith(name) or other.replace("parametrizations.", "") == name
        )
        assert torch.equal(kept, old), name
    merged = trainer.model.merge_and_unload()
    moved = {name.rpartition(".")[2] for name in _moved(merged, before)}
    assert {"gate_up", "down"} <= moved


def test_a_pipeline_writes_and_a_saved_model_comes_back(tmp_path: Path) -> None:
    policy, _ = adapted(ROUTERS["variable k"])
    pipe = transformers.pipeline("text-generation", model=policy, tokenizer=byte_tokenizer())
    (said,) = pipe("two and", max_new_tokens=5, do_sample=False)
    assert said["generated_text"].startswith("two and")
    policy.save_pretrained(tmp_path / "own")
    again = moelab.adapter.causal_lm.MoelabForCausalLM.from_pretrained(tmp_path / "own").eval()
    ids = torch.arange(5, 17).reshape(2, 6)
    assert torch.equal(again(ids).logits, policy.eval()(ids).logits)
