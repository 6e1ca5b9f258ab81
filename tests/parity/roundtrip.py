"""ours -> Hugging Face files -> transformers -> save_pretrained -> ours, for whatever transformers is installed.

Also a script, to try another version: `PYTHONPATH=core:plugins:tests python tests/parity/roundtrip.py`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moelab.config.model import ModelConfig
from moelab.hf.load import load_hf
from moelab.hf.save import save_hf
from moelab.layouts import build_layouts
from moelab.moe.layout import ExpertLayout
from moelab.registry import Registry
from parity.reference import DENSE, MOE, load_reference, reference_model, strengthen, token_ids


@dataclass(frozen=True)
class Case:
    """One way of storing one model."""

    fields: dict[str, Any]
    dtype: torch.dtype = torch.float32
    max_shard_size: int | str = "5GB"
    fused: bool = False  # transformers' copy is rewritten with 3-D experts before we read it


CASES = {
    "dense": Case(DENSE),
    "dense, tied, bf16": Case(DENSE | {"tie_word_embeddings": True}, dtype=torch.bfloat16),
    "dense, tied, sharded": Case(DENSE | {"tie_word_embeddings": True}, max_shard_size=30_000),
    "dense, head_dim given": Case(DENSE | {"head_dim": 24}),
    "moe": Case(MOE),
    "moe, bf16, sharded": Case(MOE, dtype=torch.bfloat16, max_shard_size=30_000),
    "moe, tied, sharded": Case(MOE | {"tie_word_embeddings": True}, max_shard_size="40KB"),
    "moe, fused": Case(MOE, fused=True),
    "moe, fused, bf16, tied": Case(MOE | {"tie_word_embeddings": True}, dtype=torch.bfloat16, fused=True),
    "moe, dense layers, renormalised": Case(
        MOE | {"mlp_only_layers": [1], "decoder_sparse_step": 2, "num_hidden_layers": 4, "norm_topk_prob": True}
    ),
}


@torch.no_grad()
def round_trip(case: Case, folder: Path) -> float:
    """Go round; -> largest difference of the logits, ours to transformers'. Asserts bit-equal weights on the way."""
    reference_model(case.fields).save_pretrained(folder / "first")
    ours = load_hf(folder / "first").to(case.dtype)
    strengthen(ours, seed=1)  # not the weights that came from transformers
    for parameter in ours.parameters():  # a router stays in fp32 in any model, but is stored like the rest
        parameter.copy_(parameter.to(case.dtype))

    save_hf(
        ours,
        folder / "ours",
        dtype=case.dtype,
        max_shard_size=case.max_shard_size,
        config_extra={"bos_token_id": 1, "eos_token_id": 2},
    )
    theirs = load_reference(folder / "ours", case.dtype)
    assert theirs.config.eos_token_id == 2, theirs.config.eos_token_id
    theirs.save_pretrained(folder / "theirs", max_shard_size=case.max_shard_size)
    if case.fused:
        fuse_experts(folder / "theirs" / "model.safetensors")
    back = load_hf(folder / "theirs", dtype=case.dtype)

    assert layouts_apart(back.config) == layouts_apart(ours.config), (back.config, ours.config)
    state = back.state_dict()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name
    ids = token_ids(2, 30)
    return float((ours.float()(ids).logits - load_reference(folder / "ours")(ids).logits).abs().max())


def layouts_apart(config: ModelConfig) -> tuple[ModelConfig, dict[int, ExpertLayout]]:
    """The config without its layout, and the layout of each layer: steps and dense layers can be spelt in two ways."""
    if config.moe is None:
        return config, {}
    return replace(config, moe=replace(config.moe, layout={})), build_layouts(config, Registry())


def fuse_experts(path: Path) -> None:
    """Rewrite a file with the 3-D tensors that transformers 5 holds in memory, independently of moelab's own names."""
    tensors = load_file(path)
    layers = sorted({name.split(".experts.")[0] for name in tensors if ".experts." in name})
    for layer in layers:
        count = 1 + max(
            int(name.split(".experts.")[1].split(".")[0]) for name in tensors if f"{layer}.experts." in name
        )
        parts = {
            key: [tensors.pop(f"{layer}.experts.{expert}.{key}_proj.weight") for expert in range(count)]
            for key in ("gate", "up", "down")
        }
        gate_up = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        tensors[f"{layer}.experts.gate_up_proj"] = torch.stack(gate_up)
        tensors[f"{layer}.experts.down_proj"] = torch.stack(parts["down"])
    save_file(tensors, path, metadata={"format": "pt"})


def stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(str(path), framework="pt") as file:
            names |= set(file.keys())
    return names


def main() -> None:
    torch.set_num_threads(1)
    differences = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            differences[name] = round_trip(case, Path(folder))
    json.dump({"transformers": transformers.__version__, "largest logit difference": differences}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
