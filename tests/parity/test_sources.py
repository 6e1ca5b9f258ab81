"""Every dense source: transformers' logits = those of the loaded model = those of the model with silent experts.

Models are made by transformers, small and strongly initialised (reference.py), with odd counts of heads. And the other
way: Qwen3-MoE and Mixtral, read and written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dense_checkpoints import plan_for
from moelab.config.upcycle import UpcycleConfig
from moelab.hf.config import read_config
from moelab.hf.load import load_hf
from moelab.hf.save import save_hf
from moelab_upcycling.convert import convert
from moelab_upcycling.verify import plan_of_output, verify
from parity.reference import MAJOR, strengthen

SMALL = {
    "vocab_size": 67, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 10_000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
# name -> (transformers' kind, its fields)
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, untied, every head its own": ("Qwen2", {"num_key_value_heads": 3}),
    "llama": ("Llama", {}),
    "llama, tied, head size apart": ("Llama", {"tie_word_embeddings": True, "head_dim": 10}),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 10}),
    "mistral with a window": ("Mistral", {"sliding_window": 7}),
    "qwen3": ("Qwen3", {"head_dim": 10, "num_attention_heads": 5, "num_key_value_heads": 5}),
    "qwen3, tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3 with a window": ("Phi3", {"sliding_window": 7}),
    "qwen2, yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen2, linear": ("Qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}),
    "qwen2, dynamic": (
        "Qwen2",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0},
            "max_position_embeddings": 16,
        },
    ),
    "qwen2 with a window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2 with a window in some layers, yarn": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "rope_parameters": YARN,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3 with a window": ("Qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
}
QWEN2_MOE = {
    "layout": {"name": "uniform", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "shared_expert": {"name": "gated", "intermediate_size": 24},
    "router": {"name": "softmax_topk", "norm_topk_prob": False},
}
# Whole copies whose weights sum to one: the dense function without a shared expert.
WHOLE = {
    "layout": {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
    "shared_expert": {"name": "none"},
    "router": {"name": "softmax_topk", "norm_topk_prob": True},
}
TOKENS = torch.randint(0, 67, (2, 24), generator=torch.Generator().manual_seed(0))
TOLERANCE = 1e-5  # of the logits' scale, in fp32


def made(kind: str, fields: dict[str, Any], folder: Path) -> Any:
    """A model of transformers, and its folder."""
    fields = SMALL | fields
    if MAJOR < 5 and "rope_parameters" in fields:
        fields["rope_scaling"] = fields.pop("rope_parameters")
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**fields)).eval()
    strengthen(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return float((first - second).abs().max()) <= TOLERANCE * float(second.abs().max())


def loaded(folder: Path) -> Any:
    """As transformers reads it: every tensor, and no other."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize(("kind", "fields"), SOURCES.values(), ids=SOURCES.keys())
def test_a_source_is_the_loaded_and_the_upcycled_model(kind: str, fields: dict[str, Any], tmp_path: Path):
    theirs = logits(made(kind, fields, tmp_path / "dense"))
    assert same(logits(load_hf(tmp_path / "dense")), theirs)
    normed = read_config(tmp_path / "dense").use_qk_norm
    recipe: dict[str, Any] = {"experts": {"name": "sparse"}} if normed else {"silence": 0.0}
    config = UpcycleConfig(source=str(tmp_path / "dense"), model={"moe": WHOLE if normed else QWEN2_MOE})
    for key, value in recipe.items():
        setattr(config.recipe, key, value)
    convert(plan_for(config), tmp_path / "moe", workers=1)
    assert same(logits(load_hf(tmp_path / "moe")), theirs)
    assert same(logits(loaded(tmp_path / "moe")), theirs)
    plan = plan_of_output(tmp_path / "moe", [tmp_path / "dense"])
    assert not verify(tmp_path / "moe", plan, full=True).differences


@pytest.mark.parametrize(("kind", "fields"), SOURCES.values(), ids=SOURCES.keys())
def test_what_is_written_of_a_source_is_read_by_transformers(kind: str, fields: dict[str, Any], tmp_path: Path):
    theirs = logits(made(kind, fields, tmp_path / "dense"))
    save_hf(load_hf(tmp_path / "dense"), tmp_path / "again", dtype=torch.float32)
    assert same(logits(loaded(tmp_path / "again")), theirs)


def test_mistral_becomes_mixtral_of_whole_experts(tmp_path: Path):
    theirs = logits(made("Mistral", {"sliding_window": None}, tmp_path / "dense"))
    config = UpcycleConfig(source=str(tmp_path / "dense"), target="mixtral", model={"moe": WHOLE})
    config.recipe.experts = {"name": "sparse"}
    convert(plan_for(config), tmp_path / "moe", workers=1)
    model = loaded(tmp_path / "moe")
    assert type(model).__name__ == "MixtralForCausalLM"
    assert same(logits(model), theirs)
    assert same(logits(load_hf(tmp_path / "moe")), theirs)


SHARED = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 20,
}  # fmt: skip
MOES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "norm_topk_prob": True,
            "head_dim": 8,
        },
    ),
    "qwen3_moe with biases": (
        "Qwen3Moe",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True,
            "head_dim": 8, "attention_bias": True,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 12, "num_experts_per_tok": 3}),
    "mixtral with a window": ("Mixtral", {"num_local_experts": 4, "sliding_window": 7}),
    "qwen2_moe, yarn": ("Qwen2Moe", SHARED | {"rope_parameters": YARN}),
    "qwen2_moe with a window": (
        "Qwen2Moe", SHARED | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen2_moe with a window in some layers": (
        "Qwen2Moe",
        SHARED | {
            "use_sliding_window": True, "sliding_window": 7, "rope_parameters": YARN,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "qwen3_moe with a window": (
        "Qwen3Moe",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True,
            "head_dim": 8, "use_sliding_window": True, "sliding_window": 7,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "fields"), MOES.values(), ids=MOES.keys())
def test_layouts_with_experts_are_read_and_written(kind: str, fields: dict[str, Any], tmp_path: Path):
    theirs = logits(made(kind, fields, tmp_path / "theirs"))
    ours = load_hf(tmp_path / "theirs")
    assert same(logits(ours), theirs)
    save_hf(ours, tmp_path / "ours", dtype=torch.float32)
    again = loaded(tmp_path / "ours")
    assert type(again).__name__ == f"{kind}ForCausalLM"
    assert same(logits(again), theirs)
