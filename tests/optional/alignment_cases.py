"""Tiny models and pairs that tests of post-training share: every kind of router, prompts of several lengths."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

import moelab
from moelab.config.model import ModelConfig, MoEConfig
from moelab.data.tokenizer import load_tokenizer
from moelab.nn.transformer import Transformer

LAYOUT = {"name": "uniform", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {"name": "softmax_topk"},
    "sigmoid with bias": {"name": "sigmoid_topk"},
    "variable k": {"name": "top_p"},
}
PAIRS = [
    {"prompt": "two and two is", "chosen": " four", "rejected": " fish, which nobody counts"},
    {"prompt": "a", "chosen": " b", "rejected": " c"},
    {"prompt": "the sea is", "chosen": " blue in fair weather", "rejected": " a"},
    {"prompt": "once upon", "chosen": " a time", "rejected": " a crime scene"},
]


def built(router: dict[str, Any], seed: int = 0, **moe: Any) -> Transformer:
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    config = MoEConfig(layout=dict(LAYOUT), router=dict(router), **moe)
    return moelab.build(ModelConfig(**sizes | heads, moe=config), seed=seed)


def adapted(router: dict[str, Any], seed: int = 0) -> tuple[Any, Any]:
    """A policy and its reference: equal, with nothing in common."""
    model = built(router, seed)
    return moelab.as_transformers(model), moelab.as_transformers(copy.deepcopy(model))


def byte_tokenizer() -> Any:
    return moelab.transformers_tokenizer(load_tokenizer("bytes"))


def quiet(kind: Any, folder: Path, **more: Any) -> Any:
    """The arguments of one of TRL's trainers, without reports, checkpoints or bars."""
    said = {
        "output_dir": str(folder), "report_to": [], "save_strategy": "no", "logging_steps": 1, "use_cpu": True,
        "bf16": False, "per_device_train_batch_size": 4, "disable_tqdm": True, "seed": 3,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return kind(**said | more)


def pairs(rows: list[dict[str, Any]] = PAIRS) -> Dataset:
    return Dataset.from_list(rows)


def first_batch(trainer: Any) -> dict[str, torch.Tensor]:
    """All of a small dataset in one batch, in its order."""
    batch: dict[str, torch.Tensor] = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PAIRS))])
    return batch
