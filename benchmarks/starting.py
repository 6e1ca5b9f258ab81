"""What it takes to start from a checkpoint: peak memory over the weights, and seconds, each in a process of its own.

    python benchmarks/starting.py                  # a MoE of about 1 GB; results/ is rewritten
    python benchmarks/starting.py --gigabytes 4

Peak: VmHWM of the process, less that of one which builds the same model on the meta device and reads nothing. The
weights are those that stay: 4 bytes a parameter, or 2 where they are loaded as bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from moelab.builder import build_model, resolve_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.run import RunConfig, TrainConfig
from moelab.config.stored import to_yaml
from moelab.hf.save import save_hf
from moelab.loading import load
from moelab.origin import read_origin
from moelab.registry import Registry
from moelab.training.checkpoint import TrainingState, save_checkpoint
from moelab.training.start import Start, starting_model
from report import machine, markdown_table, write_results

HERE = Path(__file__).resolve().parent
HIDDEN, EXPERTS, WIDTH = 512, 64, 256
WAYS = ("nothing", "init_from, float32 folder", "init_from, bfloat16 folder", "init_from, own checkpoint",
        "load, float32 folder", "load, own checkpoint", "load as bfloat16, own checkpoint")  # fmt: skip


def config_of(gigabytes: float) -> ModelConfig:
    """Whose parameters take so much in float32."""
    layers = max(1, round(gigabytes * 1e9 / 4 / (EXPERTS * 3 * HIDDEN * WIDTH)))
    config = ModelConfig(
        vocab_size=8192, hidden_size=HIDDEN, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True,
        moe=MoEConfig(layout={"name": "uniform", "num_experts": EXPERTS, "num_experts_per_tok": 8,
                              "moe_intermediate_size": WIDTH},
                      router={"name": "softmax_topk", "norm_topk_prob": False},
                      shared_expert={"name": "gated", "intermediate_size": 1024}),
    )  # fmt: skip
    resolve_model(config, Registry())
    return config


def make(folder: Path, config: ModelConfig) -> None:
    """The same weights in three folders."""
    model = build_model(config, seed=0)
    save_hf(model, folder / "float32", dtype=torch.float32)
    save_hf(model, folder / "bfloat16", dtype=torch.bfloat16)
    run = RunConfig(run_dir="none", model=config, train=TrainConfig(steps=1))
    optimizer = torch.optim.AdamW(model.parameters())  # which has no state before its first step
    files = {"config.yaml": to_yaml(run).encode()}
    save_checkpoint(folder / "own", model, TrainingState(optimizer, []), {"step": 1}, files)


def child(folder: Path, way: str, gigabytes: float) -> dict[str, float]:
    """In a process of its own: seconds, and the peak of its resident set in bytes."""
    torch.set_num_threads(1)
    config = config_of(gigabytes)
    build_model(config, device="meta", seed=None)
    source = folder / ("own" if "own" in way else "bfloat16" if "bfloat16 folder" in way else "float32")
    began = time.perf_counter()
    if way.startswith("init_from"):
        run = RunConfig(model=config, train=TrainConfig(init_from=str(source)))
        starting_model(run, Registry(), torch.device("cpu"), Start(read_origin(source)))
    elif way.startswith("load"):
        load(source, dtype=torch.bfloat16 if "as bfloat16" in way else torch.float32, verify=False)
    seconds = time.perf_counter() - began
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    return {"seconds": seconds, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "WAY"))
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(Path(options.child[0]), options.child[1], options.gigabytes)))
        return
    config = config_of(options.gigabytes)
    model = build_model(config, device="meta", seed=None)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        make(Path(temporary), config)
        for way in WAYS:
            command = [sys.executable, __file__, "--gigabytes", str(options.gigabytes), "--child", temporary, way]
            results[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = []
    for way in WAYS[1:]:
        weights = numbers * (2 if "as bfloat16" in way else 4)
        ratio = (results[way]["peak"] - results["nothing"]["peak"]) / weights
        results[way]["ratio"] = ratio
        rows.append([way, f"{weights / 1e9:.2f} GB", f"{ratio:.3f}", f"{weights / 1e9 / results[way]['seconds']:.2f}"])
    table = markdown_table(["what", "weights", "peak / weights", "GB/s"], rows)
    facts = {**machine(), "parameters": f"{numbers:,}", "threads": 1}
    write_results(options.out, "starting", facts, results, ["", "From the page cache.", "", table, ""])
    print(table)


if __name__ == "__main__":
    main()
