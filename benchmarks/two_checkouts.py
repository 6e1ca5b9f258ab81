"""A training step of two checkouts of this repository, in alternating processes: has a change made it slower?

    git worktree add ../before 0a51dc7 && python benchmarks/two_checkouts.py ../before .

Each pair runs both sides one after the other, the order changing from pair to pair; a side's figure is the median of
its steps. Printed: the ratio new / old of each pair, and their median. Two shapes: plain top-k with a balance loss,
and sigmoid scores with a selection bias.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FOLDERS = ("core", "plugins", "upcycling", "tools")
WARM_UP, SEQUENCES, LENGTH, VOCABULARY = 4, 8, 256, 2048
SHAPES: dict[str, dict[str, Any]] = {
    "32 x 128, top-4, softmax, load_balance": {
        "layout": {"name": "uniform", "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 128},
        "router": {"name": "softmax_topk"},
        "balance_losses": [{"name": "load_balance", "weight": 0.01}],
    },
    "64 x 80, top-8, sigmoid, bias": {
        "layout": {"name": "uniform", "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 80},
        "router": {"name": "sigmoid_topk"},
    },
}


def measure(shape: str, threads: int, steps: int) -> float:
    """Seconds of a step in this process, median; runs with whichever checkout is on the path."""
    import torch

    from moelab.builder import build_balance_losses, build_model, resolve_model
    from moelab.config.model import ModelConfig, MoEConfig
    from moelab.config.run import OptimizerConfig, TrainConfig
    from moelab.data.batches import Batch
    from moelab.nn.allocator import keep_freed_memory
    from moelab.registry import Registry

    room = "moelab.training" if find_spec("moelab.training") else "moelab.train"  # as it was called before
    build_adamw = import_module(f"{room}.optimizer").build_adamw
    choose_precision = import_module(f"{room}.precision").choose_precision
    step_of = import_module(f"{room}.step")

    torch.set_num_threads(threads)
    keep_freed_memory()
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, moe=MoEConfig(**SHAPES[shape]),
    )  # fmt: skip
    registry = Registry(entry_points=False)
    resolve_model(config, registry)
    model, losses = build_model(config, registry, seed=0), build_balance_losses(config, registry)
    optimizer = build_adamw(model, OptimizerConfig())
    settings = step_of.StepSettings(SEQUENCES, 1.0, 0, choose_precision(TrainConfig(steps=1, device="cpu")))
    ids = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    none = torch.zeros_like(ids)
    batch = Batch(ids, ids.roll(-1, 1), none, none, None)
    seconds = []
    for step in range(WARM_UP + steps):
        started = time.perf_counter()
        step_of.train_step(model, optimizer, losses, batch, step, settings)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:])


def run(checkout: Path, shape: str, threads: int, steps: int) -> float:
    """`measure` in a process of its own that imports `checkout`."""
    path = os.pathsep.join(str(checkout.resolve() / folder) for folder in FOLDERS)
    command = [sys.executable, __file__, "--worker", shape, "--threads", str(threads), "--steps", str(steps)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout}: {done.stderr.strip()[-1000:]}")
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, metavar="OLD NEW")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each process, after four of warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worker", metavar="SHAPE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(measure(arguments.worker, arguments.threads, arguments.steps))
        return
    if len(arguments.checkouts) != 2:
        parser.error("name two checkouts, the old one and the new one")
    for checkout in arguments.checkouts:
        if not (checkout / "core" / "moelab").is_dir():
            parser.error(f"{checkout}: is no checkout of moelab: it has no core/moelab")
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, {arguments.pairs} pairs")
    for shape in SHAPES:
        ratios, olds = [], []
        for pair in range(arguments.pairs):
            seconds = [0.0, 0.0]
            for side in (0, 1) if pair % 2 == 0 else (1, 0):
                seconds[side] = run(arguments.checkouts[side], shape, arguments.threads, arguments.steps)
            old, new = seconds
            ratios.append(new / old)
            olds.append(old)
        listed = " ".join(f"{ratio:.3f}" for ratio in sorted(ratios))
        print(f"{shape}: new / old {statistics.median(ratios):.3f} (of {listed}); old {statistics.median(olds):.3f} s")


if __name__ == "__main__":
    main()
