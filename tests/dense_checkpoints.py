"""Tiny dense Qwen2 checkpoints, and reading of checkpoints, for the upcycling tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelab.config.model import ModelConfig
from moelab.config.upcycle import RecipeConfig, UpcycleConfig
from moelab.hf.names import hf_shapes, parameter_shapes
from moelab_upcycling.convert import Outcome, convert, prepare, registry_of
from moelab_upcycling.plan import Plan


@dataclass
class Tiny:
    """57B-A14B's proportions: 592 = 7.4 x 80, 8 x 80 = 640."""

    hidden: int = 32
    width: int = 592
    layers: int = 2
    vocab: int = 64
    tied: bool = False
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0


def dense_tensors(tiny: Tiny) -> dict[str, Tensor]:
    """Every neuron has statistics of its own."""
    generator = torch.Generator().manual_seed(tiny.seed)
    tensors = {}
    for name, shape in hf_shapes(parameter_shapes(model_config(tiny), {})).items():
        values = torch.randn(shape, generator=generator) * 0.05
        if "gate_proj" in name or "up_proj" in name:
            values = values * torch.linspace(0.5, 2, shape[0])[:, None] + torch.linspace(-0.1, 0.1, shape[0])[:, None]
        if "down_proj" in name:
            values = values * torch.linspace(0.5, 2, shape[1])
        if "norm" in name:
            values = values + 1
        tensors[name] = values.to(tiny.dtype)
    return tensors


def model_config(tiny: Tiny) -> ModelConfig:
    return ModelConfig(
        vocab_size=tiny.vocab,
        hidden_size=tiny.hidden,
        intermediate_size=tiny.width,
        num_hidden_layers=tiny.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tiny.tied,
    )


def write_dense(folder: Path, tiny: Tiny | None = None, *, shards: int = 1, **changed: Tensor) -> Path:
    """`changed` replaces tensors by name with dots as double underscores."""
    tiny = tiny or Tiny()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dense_tensors(tiny) | {name.replace("__", "."): value for name, value in changed.items()}
    config = model_config(tiny)
    raw: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **{k: v for k, v in vars(config).items() if k not in ("moe", "head_dim")},
        "torch_dtype": str(tiny.dtype).removeprefix("torch."),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def recipe_config(source: Any, **keys: Any) -> UpcycleConfig:
    """The shipped recipe at the tiny size; `recipe` and `moe` are laid over it."""
    moe = {
        "layout": {"name": "uniform", "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 80},
        "shared_expert": {"name": "gated", "intermediate_size": 640},
        "router": {"name": "softmax_topk", "norm_topk_prob": False},
    } | keys.pop("moe", {})
    recipe = RecipeConfig(**keys.pop("recipe", {}))
    return UpcycleConfig(source=source, model={"moe": moe} | keys.pop("model", {}), recipe=recipe, workers=1, **keys)


def plan_for(config: UpcycleConfig) -> Plan:
    config.source = [str(s) for s in config.source] if isinstance(config.source, list) else str(config.source)
    config.check()
    return prepare(config, registry_of(config))


def upcycle(config: UpcycleConfig, output: Path | None, **keys: Any) -> Outcome:
    return convert(plan_for(config), output, workers=config.workers, **keys)


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, by safetensors' own reader."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def neurons(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """{matrix: [n, D]} of one FFN, neuron-major."""
    return {
        "gate": tensors[f"{prefix}.gate_proj.weight"],
        "up": tensors[f"{prefix}.up_proj.weight"],
        "down": tensors[f"{prefix}.down_proj.weight"].T.contiguous(),
    }
