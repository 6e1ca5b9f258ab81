"""Makes a random dense Qwen2 checkpoint of true proportions, a tensor piece at a time, for tests and benchmarks.

    python benchmarks/make_source.py OUTPUT --model qwen2-7b --layers 2

The values mean nothing, but their statistics differ from neuron to neuron, as a trained model's do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab.config.files import config_folder
from moelab.config.load import load_config
from moelab.config.model import ModelConfig
from moelab.config.run import RunConfig
from moelab.hf.files import INDEX_FILE
from moelab.hf.names import hf_shapes, parameter_shapes
from moelab_upcycling.dtypes import TORCH_NAMES, from_float32
from moelab_upcycling.plan import OutputTensor, Shard
from moelab_upcycling.streams import normal_table, stream
from moelab_upcycling.writer import ShardWriter, write_text

_PIECE = 1 << 22  # values made at a time


def main() -> None:
    """Parse the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="qwen2-7b", help="a file of configs/model")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--vocab-size", type=int, default=None, help="fewer rows, where the disk is small")
    parser.add_argument("--dtype", choices=["BF16", "F32"], default="BF16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = _model(arguments.model)
    model.num_hidden_layers = arguments.layers or model.num_hidden_layers
    model.vocab_size = arguments.vocab_size or model.vocab_size
    make_source(arguments.output, model, arguments.dtype, arguments.seed)


def make_source(output: Path, model: ModelConfig, dtype: str = "BF16", seed: int = 0) -> None:
    """Write config.json, one shard a layer, one for the rest, and the index."""
    output.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[OutputTensor]] = {}
    for name, shape in hf_shapes(parameter_shapes(model, {})).items():
        key = name.split(".")[2] if ".layers." in name else "rest"
        groups.setdefault(key, []).append(OutputTensor(name, dtype, shape, "copy"))
    weight_map = {}
    for number, tensors in enumerate(groups.values(), 1):
        shard = Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(tensors))
        writer = ShardWriter(output / shard.file, shard.nbytes)
        writer.write(shard.header)
        for tensor in tensors:
            for piece in random_values(tensor, seed):
                writer.write(piece)
        writer.commit()
        weight_map |= {tensor.name: shard.file for tensor in tensors}
        print(f"{output / shard.file}: {shard.nbytes / 1e9:.2f} GB", flush=True)
    write_text(output / "config.json", json.dumps(config_json(model, dtype), indent=2) + "\n")
    total = sum(tensor.nbytes for tensors in groups.values() for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(output / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def random_values(tensor: OutputTensor, seed: int) -> Iterator[npt.NDArray[Any]]:
    """Rows ~ N(0, (0.02 s)^2) with s in 0.5 .. 1.5 by row and column; norms are near one."""
    source = stream(seed, "make_source/1", 0, "values", matrix=tensor.name)
    rows = tensor.shape[0]
    width = int(np.prod(tensor.shape[1:]))
    table = normal_table(0.0, 0.02, "F32").astype(np.float32)
    by_column = 0.5 + np.arange(width, dtype=np.float32) / max(1, width)
    step = max(1, _PIECE // width)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        raw = source.random_raw(-(-count * width // 4)).view(np.uint16)[: count * width]
        by_row = 0.5 + (np.arange(start, start + count, dtype=np.float32) / max(1, rows))[:, None]
        values = table[raw].reshape(count, width) * by_row * by_column
        if "norm" in tensor.name:
            values = values + np.float32(1)
        yield from_float32(values.astype(np.float32), tensor.dtype)


def config_json(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """As Qwen2's own config.json has it."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.initializer_range,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "max_window_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_hidden_layers,
        "num_key_value_heads": model.num_key_value_heads,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "sliding_window": 131072,
        "tie_word_embeddings": model.tie_word_embeddings,
        "torch_dtype": TORCH_NAMES[dtype],
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": model.vocab_size,
    }


def _model(name: str) -> ModelConfig:
    path = config_folder() / "model" / f"{name}.yaml"
    return load_config([str(path), "run_dir=unused", "train.steps=1"], RunConfig).config.model


if __name__ == "__main__":
    main()
