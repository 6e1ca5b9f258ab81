"""Every published recipe of configs/moe and every router trains on text: loss falls, nothing is NaN, balance holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moelab import Registry
from moelab.config.load import load_config
from moelab.config.run import RunConfig
from moelab.hookspecs import ROUTERS
from moelab.training.trainer import train

ROOT = Path(__file__).resolve().parents[2]
TOY = [
    str(ROOT / "configs/train/tiny_moe.yaml"), "train.sequence_length=64", "train.batch_size=4", "train.log_every=1",
    "train.threads=1", "evaluation.sequences=4", "evaluation.sample_tokens=8", "observers=[]", "model.hidden_size=32",
    "model.intermediate_size=48", "data.validation_fraction=0.1",
    # One text that is the same wherever the tests run: the embedded corpus depends on what is installed.
    f"data.source={{name: text, paths: [{ROOT / 'LICENSE'}], separator: \"\\n\\n\"}}",
]  # fmt: skip
# What the recipe's sizes become.
LAYOUT, E = "model.moe.layout", "model.moe.layout.num_experts=8"
SMALL = [E, f"{LAYOUT}.num_experts_per_tok=2", f"{LAYOUT}.moe_intermediate_size=16"]
RECIPES: dict[str, list[str]] = {
    "switch": [E, f"{LAYOUT}.moe_intermediate_size=16"],
    "gshard": [E, f"{LAYOUT}.moe_intermediate_size=16"],
    "mixtral": [],
    "deepseek_moe": [*SMALL, "model.moe.shared_expert.intermediate_size=16"],
    "deepseek_v3": [
        *SMALL, f"{LAYOUT}.first_k_dense_replace=1", "model.moe.router.n_group=4", "model.moe.router.topk_group=2",
        "model.moe.shared_expert.intermediate_size=16",
    ],
    "qwen1.5-moe-a2.7b": [*SMALL, "model.moe.shared_expert.intermediate_size=64"],
    "qwen2-57b-a14b": [*SMALL, "model.moe.shared_expert.intermediate_size=64"],
    "olmoe": SMALL,
    "moe_plus_plus": [],
    "remoe": [],
    "expert_choice": SMALL,
    "llama4_scout": [E, f"{LAYOUT}.moe_intermediate_size=16", "model.moe.shared_expert.intermediate_size=16"],
    "deepseek_v4": [*SMALL, "model.moe.shared_expert.intermediate_size=16", "model.num_hidden_layers=4"],
    "longcat_flash": [
        *SMALL, f"{LAYOUT}.num_experts_per_tok=3", "model.moe.router.num_null_experts=4",
        "model.moe.router.target_experts=2",
    ],
    "emo": [
        *SMALL, "model.moe.shared_expert.intermediate_size=16",
        "model.moe.router.document_pool={smallest: 2, largest: 8}",
    ],
    "qwen3_moe": SMALL,
    "qwen3_next": [*SMALL, "model.moe.shared_expert.intermediate_size=16"],
    "gpt_oss": SMALL,
    "nemotron3_nano": [*SMALL, "model.moe.shared_expert.intermediate_size=24"],
    "nemotron3_super": [*SMALL, "model.moe.shared_expert.intermediate_size=24", "model.moe.moe_latent_size=16"],
    "kimi_k3": [*SMALL, "model.moe.shared_expert.intermediate_size=16", "model.moe.moe_latent_size=16"],
}  # fmt: skip
# What else a router needs in the tiny config.
NEEDS: dict[str, list[str]] = {
    "switch": [f"{LAYOUT}.num_experts_per_tok=1"],
    "base": [f"{LAYOUT}.num_experts_per_tok=1"],
    "noisy_topk": ["model.moe.balance_losses=[{name: importance}, {name: noisy_load}]"],
    "remoe": ["model.moe.balance_losses=[{name: remoe_l1}]"],
    "null_experts": ["model.moe.balance_losses=[{name: null_load_balance, kind: average}]"],
    "moe_plus_plus": ["model.moe.balance_losses=[{name: null_load_balance}]"],
    "mixture_of_depths": [
        "model.moe.balance_losses=[{name: depth_predictor}, {name: load_balance, weight: 0.1}]",
        "model.moe.router.capacity=0.5",
    ],
    "token_rounding": ["model.moe.router.tile=16"],
    "top_p": ["model.moe.balance_losses=[{name: entropy}, {name: load_balance, weight: 0.1}]"],
    **{
        name: ["model.moe.balance_losses=[]"]
        for name in ("hash", "forced_random", "forced_round_robin", "expert_choice")
    },
}

# Even by construction, or (forced_random) but for chance: about 0.17 with 64 assignments an expert.
EXACT = {"base": 0.01, "expert_choice": 0.01, "forced_round_robin": 0.01, "forced_random": 0.5}
ROUTER_NAMES = sorted(Registry(entry_points=False).components(ROUTERS))
# hash has the text's own load; remoe's loss steers how many experts serve, not how evenly; thresholds need no loss.
BALANCED = sorted(set(ROUTER_NAMES) - EXACT.keys() - {"hash", "remoe", "expert_threshold"})
LOSS = "model.moe.balance_losses"
# 50 steps must do what a run has thousands for: the first loss with weight 1, or
PRESSED = {
    "mixture_of_depths": [f"{LOSS}.1.weight=20"],
    "top_p": [f"{LOSS}.1.weight=1"],
    "moe_plus_plus": [f"{LOSS}.0.weight=100"],  # at 1, zero, copy and constant experts take what real ones leave
    "sinkhorn": [f"{LOSS}=[]"],  # its plan balances
}
TWIN = {"sinkhorn": "softmax_topk"}  # the same scores without a plan
UNBIASED = {name: ["model.moe.router.balance=none"] for name in ("sigmoid_topk", "sqrtsoftplus_topk")}
QUIET = ["model.moe.allow_noncausal=true", "evaluation.sequences=1", "evaluation.sample_tokens=0"]


def run(arguments: list[str], folder: Path, steps: int) -> list[dict[str, Any]]:
    """Train and return the rows of metrics.jsonl."""
    config = load_config([*arguments, f"run_dir={folder / 'run'}", f"train.steps={steps}"], RunConfig).config
    train(config)
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def test_every_recipe_is_tried() -> None:
    assert {path.stem for path in (ROOT / "configs/moe").glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_its_source(name: str) -> None:
    first = (ROOT / f"configs/moe/{name}.yaml").read_text().splitlines()
    assert first[0].startswith("# ")
    assert any(character.isdigit() for character in first[0])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name: str, tmp_path: Path) -> None:
    recipe = str(ROOT / f"configs/moe/{name}.yaml")
    rows = run([TOY[0], recipe, *TOY[1:], *RECIPES[name], "train.micro_batch_size=2"], tmp_path, 6)
    losses = [row["train/lm_loss"] for row in rows if "train/lm_loss" in row]
    assert losses[-1] < losses[0] - 0.2
    assert rows[-1]["eval/loss"] < losses[0]


LATENT = "model.latent_attention"
# Whole models of configs/model that are no recipe on top of another one, at toy size.
WHOLE: dict[str, list[str]] = {
    "deepseek-v3": [
        *SMALL, f"{LAYOUT}.first_k_dense_replace=1", "model.moe.router.n_group=4", "model.moe.router.topk_group=2",
        "model.moe.shared_expert.intermediate_size=16", f"{LATENT}.q_lora_rank=12",
    ],
    "deepseek-v2-lite": [*SMALL, "model.moe.shared_expert.intermediate_size=32"],
}  # fmt: skip
TWIN_SIZES = [
    "model.vocab_size=257", "model.num_hidden_layers=2", "model.num_attention_heads=2", "model.num_key_value_heads=2",
    f"{LATENT}.kv_lora_rank=16", f"{LATENT}.qk_nope_head_dim=12", f"{LATENT}.qk_rope_head_dim=8",
    f"{LATENT}.v_head_dim=10", "optimizer.algorithm.name=muon", "data.document_mask=true",
]  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_models_twin_trains(name: str, tmp_path: Path) -> None:
    """With rope scaling, documents kept apart, an optimizer that takes matrices otherwise, layers computed again."""
    model = str(ROOT / f"configs/model/{name}.yaml")
    more = ["train.micro_batch_size=2", "train.activation_checkpointing=1"]
    rows = run([TOY[0], model, *TOY[1:], *TWIN_SIZES, *WHOLE[name], *more], tmp_path, 6)
    losses = [row["train/lm_loss"] for row in rows if "train/lm_loss" in row]
    assert losses[-1] < losses[0] - 0.2
    assert rows[-1]["eval/loss"] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTER_NAMES)
def test_a_router_learns(name: str, tmp_path: Path) -> None:
    """50 steps on text take 1.5 nats off the loss; 2.1 in the worst of 800 runs, over seeds, weights and processors."""
    router = [f"model.moe.router.name={name}", "model.moe.allow_noncausal=true"]
    rows = run([*TOY, *router, *NEEDS.get(name, [])], tmp_path, 50)
    losses = [row["train/lm_loss"] for row in rows if "train/lm_loss" in row]
    assert losses[-1] < losses[0] - 1.5
    if name in EXACT:
        assert violation(rows) < EXACT[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", BALANCED)
def test_a_balanced_router_is_far_more_even_than_the_same_run_unbalanced(name: str, tmp_path: Path) -> None:
    """At most 0.65 of the unbalanced runs' MaxVio, over three seeds.

    A single run is chaotic: its MaxVio changes by half with the seed and with the last bit of a sum. Of 3 out of 12
    seeds, in all 220 ways and with two sets of kernels, the ratio was 0.16 to 0.38 at the median and 0.46 at worst.
    """
    balanced, unbalanced = 0.0, 0.0
    for seed in range(3):
        same = [*TOY, *QUIET, f"seed={seed}", f"data.seed={seed}", *NEEDS.get(name, [])]
        on = [f"model.moe.router.name={name}", *PRESSED.get(name, [f"{LOSS}.0.weight=1"])]
        off = [f"model.moe.router.name={TWIN.get(name, name)}", "model.moe.balance_losses=[]", *UNBIASED.get(name, [])]
        balanced += violation(run([*same, *on], tmp_path / f"balanced{seed}", 50))
        unbalanced += violation(run([*same, *off], tmp_path / f"unbalanced{seed}", 50))
    assert balanced < 0.65 * unbalanced


def violation(rows: list[dict[str, Any]]) -> float:
    """MaxVio of the last ten steps, max load / mean load - 1: a single step of 256 tokens is noisy."""
    logged = [row["moe/mean/max_violation"] for row in rows if "moe/mean/max_violation" in row]
    return sum(logged[-10:]) / 10
