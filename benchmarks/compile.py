"""What `train.compile` does to a training step: time beside eager, seconds to compile, and whether numbers stay.

    python benchmarks/compile.py                       # results in benchmarks/results/compile.md
    python benchmarks/compile.py --device cuda --dtype bfloat16
    python benchmarks/compile.py --add --parts cpu     # in pieces: the results of others stay

Two models of the same weights in one process take the same steps in turns. On a CPU, once with the parts that the
trainer compiles there (norms, routers, losses) and once with those of an accelerator (attention and shared experts
too), which have kernels of our own there. Needs a C++ compiler; on a GPU, triton. The first step's seconds are the
compiler's where TORCHINDUCTOR_CACHE_DIR names an empty folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import moelab
from moelab.builder import build_balance_losses
from moelab.config.model import ModelConfig, MoEConfig
from moelab.data.batches import Batch
from moelab.nn.allocator import keep_freed_memory
from moelab.registry import Registry
from moelab.training.compiled import compile_parts
from moelab.training.precision import Precision
from moelab.training.step import StepSettings, train_step
from report import machine, markdown_table, median, write_results

HERE = Path(__file__).resolve().parent
BATCH, LENGTH, WARM_UP = 8, 512, 2
SHAPES = {"32 x 128, top-4": (32, 4, 128), "128 x 64, top-8": (128, 8, 64)}
KEYS = ("shape", "dtype", "kind")  # of a result


@dataclass
class Side:
    """A model, and what trains it."""

    model: Any
    losses: Any
    optimizer: torch.optim.Optimizer
    compiled: Any = None

    def step(self, number: int, precision: Precision) -> tuple[float, float]:
        """-> seconds, loss."""
        ids = torch.randint(0, 4096, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(number))
        nothing = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
        batch, settings = Batch(ids[:, :-1], ids[:, 1:], nothing, nothing), StepSettings(BATCH, 1.0, 0, precision)
        _wait(precision)
        began = time.perf_counter()
        result = train_step(self.model, self.optimizer, self.losses, batch, number, settings)
        _wait(precision)
        return time.perf_counter() - began, float(result.losses["loss"])


def _wait(precision: Precision) -> None:
    if precision.device.type == "cuda":
        torch.cuda.synchronize()


def build(shape: tuple[int, int, int], precision: Precision, parts: str | None) -> Side:
    """parts: of which kind of device; None: eager."""
    experts, top_k, width = shape
    layout = {
        "name": "uniform",
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": width,
    }
    losses = [{"name": "load_balance", "weight": 0.01, "scope": "global"}, {"name": "router_z", "weight": 1e-3}]
    moe = MoEConfig(layout=layout, shared_expert={"name": "gated", "intermediate_size": 512}, balance_losses=losses)
    config = ModelConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, moe=moe,
    )  # fmt: skip
    registry = Registry(entry_points=False)
    model = moelab.build(config, registry, seed=0).to(precision.device).train()
    named, run = build_balance_losses(config, registry), None
    if parts is not None:
        run, named = compile_parts(model, named, parts)
    return Side(model, named, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), run)


def measured(shape: tuple[int, int, int], precision: Precision, parts: str, rounds: int) -> dict[str, Any]:
    """Both sides in turns."""
    torch._dynamo.reset()
    sides = [build(shape, precision, None), build(shape, precision, parts)]
    seconds: list[list[float]] = [[], []]
    apart, first = 0.0, 0.0
    for number in range(WARM_UP + rounds):
        losses = []
        for side, times in zip(sides, seconds, strict=True):
            took, loss = side.step(number, precision)
            times.append(took)
            losses.append(loss)
        if number < 3:
            apart = max(apart, abs(losses[0] - losses[1]) / losses[0])
        first = max(first, seconds[1][number]) if number < WARM_UP else first
    eager, compiled = (median(times[WARM_UP:]) for times in seconds)
    run = sides[1].compiled
    return {
        "eager": eager, "compiled": compiled, "first": first, "apart": apart, "graphs": run.graphs,
        "parts": len(run.parts), "refused": run.refused, "without": run.without,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--parts", nargs="+", default=None, choices=("cpu", "cuda"), help="of which kind of device")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--add", action="store_true", help="keep what else stands in the results")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    name = "compile" if options.device == "cpu" else "compile_gpu"
    kept = options.out / f"{name}.json"
    found = json.loads(kept.read_text())["results"] if options.add and kept.exists() else []
    results = {tuple(one[key] for key in KEYS): one for one in found}
    kinds = options.parts or (["cpu", "cuda"] if options.device == "cpu" else ["cuda"])
    for case in itertools.product(options.shapes, options.dtype, kinds):
        shape, dtype, parts = case
        precision = Precision(torch.device(options.device), getattr(torch, dtype))
        measures = measured(SHAPES[shape], precision, parts, options.rounds)
        results[case] = dict(zip(KEYS, case, strict=True)) | measures
        print(" | ".join(row(results[case])), flush=True)
    head = ["experts", "dtype", "compiled", "speed beside eager", "first step, s", "parts in graphs", "losses apart"]
    facts = machine() | {"threads": options.threads, "device": options.device}
    table = markdown_table(head, [row(one) for one in results.values()])
    write_results(options.out, name, facts, list(results.values()), ["", table, ""])


def row(found: dict[str, Any]) -> list[str]:
    """Of the table."""
    kind = "norms, routers, losses" if found["kind"] == "cpu" else "attention, shared too"
    speed, graphs = found["eager"] / found["compiled"], f"{found['parts']} in {found['graphs']}"
    return [
        found["shape"], found["dtype"], kind, f"{speed:.2f} x", f"{found['first']:.0f}", graphs, f"{found['apart']:.0e}"
    ]  # fmt: skip


if __name__ == "__main__":
    main()
