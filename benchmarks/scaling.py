"""Two processes of one thread against one process of two threads, in tokens a second, taking turns in one run.

python benchmarks/scaling.py                    # on an idle machine; results in benchmarks/results/scaling.md

Started by itself twice: as one process, and as a group of two. Each lives through the whole run and computes only when
it is its turn, so that both see the same machine. The load is in the record: on a busy one the threads of one process
wait for each other at barriers, and the ratio says nothing. Layers kept whole: `parallel.reshard_after_forward: false`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("core", "plugins", "upcycling", "tools", "tests")]

import torch  # noqa: E402  (after the path)
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

import moelab  # noqa: E402
from collectives import Case, batch_of  # noqa: E402
from moelab.builder import build_balance_losses  # noqa: E402
from moelab.config.model import ModelConfig, MoEConfig  # noqa: E402
from moelab.nn.allocator import keep_freed_memory  # noqa: E402
from moelab.parallel.group import Group  # noqa: E402
from moelab.parallel.mesh import make_meshes  # noqa: E402
from moelab.parallel.parallelise import parallelise  # noqa: E402
from moelab.parallel.ranks import ALONE, Ranks  # noqa: E402
from moelab.training.precision import Precision  # noqa: E402
from moelab.training.step import StepSettings, train_step  # noqa: E402
from report import machine, markdown_table, write_results  # noqa: E402

KEPT: dict[str, Any] = {"reshard_after_forward": False}
MESHES: dict[str, dict[str, Any]] = {
    "1 process x 2 threads": {},
    "1 process x 1 thread": {},
    "2 x 1, shard 2": {"shard": 2},
    "2 x 1, shard 2, expert 2": {"shard": 2, "expert": 2},
    "2 x 1, replicate 2": {"replicate": 2},
    "2 x 1, shard 2, layers kept whole": {"shard": 2} | KEPT,
    "2 x 1, shard 2, expert 2, layers kept whole": {"shard": 2, "expert": 2} | KEPT,
    "2 x 1, replicate 2, layers kept whole": {"replicate": 2} | KEPT,
}
THREADS = {"1 process x 2 threads": 2}
BASELINE = next(iter(MESHES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    chosen = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in MESHES}
    loads = []
    with tempfile.TemporaryDirectory() as folder:
        sides = {name: start(name, Path(folder), chosen) for name in MESHES}
        for number in range(chosen.rounds + 2):
            loads.append(os.getloadavg()[0])
            for name, pipes in sides.items():
                for pipe in pipes:
                    pipe.send("step")
                took = max(pipe.recv() for pipe in pipes)
                seconds[name] += [took] if number >= 2 else []  # the first two warm up
        for pipes in sides.values():
            for pipe in pipes:
                pipe.send("end")
    tokens = chosen.sequences * chosen.length
    rows, results = [], []
    for name, taken in seconds.items():
        # Round by round, since what disturbs one side of a round may disturb the other.
        ratios = [base / own for base, own in zip(seconds[BASELINE], taken, strict=True)]
        rate, ratio = tokens / statistics.median(taken), statistics.median(ratios)
        results.append({"side": name, "seconds": taken, "tokens_per_second": rate, "ratio": ratio})
        rows.append([name, f"{rate:,.0f}", f"{tokens / min(taken):,.0f}", f"{ratio:.2f}"])
        rows[-1].append(f"{min(seconds[BASELINE]) / min(taken):.2f}")
    head = ["side", "tokens/s, median", "best", f"against {BASELINE}: median of rounds", "best against best"]
    facts = machine() | {"load_average_least_and_most": [min(loads), max(loads)], **vars(chosen)}
    facts.pop("output")
    table = markdown_table(head, rows)
    print(table)
    write_results(chosen.output, "scaling", facts, results, ["", table, ""])


def start(name: str, folder: Path, chosen: argparse.Namespace) -> list[Any]:
    """The processes of one side, and the pipes to them."""
    context, world = mp.get_context("spawn"), Case(MESHES[name], 1, 1, 1).mesh.world
    pipes = []
    for rank in range(world):
        ours, theirs = context.Pipe()
        store = str(folder / name.replace(" ", "_"))
        context.Process(target=side, args=(name, rank, world, store, theirs, chosen), daemon=True).start()
        pipes.append(ours)
    return pipes


def side(name: str, rank: int, world: int, store: str, pipe: Connection, chosen: argparse.Namespace) -> None:
    """One process: a step whenever it is told to, and how long that took."""
    torch.set_num_threads(THREADS.get(name, 1))
    keep_freed_memory()
    case = Case(MESHES[name], chosen.sequences, chosen.sequences // 2, chosen.length)
    model_config, registry = config(chosen.hidden), moelab.Registry(entry_points=False)
    model, losses = moelab.build_model(model_config, registry, seed=1), build_balance_losses(model_config, registry)
    ranks: Ranks = ALONE
    if world > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
        ranks, resharding = Group(config=case.mesh), case.mesh.reshard_after_forward
        parallelise(model, make_meshes(case.mesh, world, "cpu"), losses, reshard_after_forward=resharding)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    settings = StepSettings(case.micro, 1.0, 0, Precision(torch.device("cpu"), torch.float32))
    batch, step = batch_of(model_config, case, 0), 0
    while pipe.recv() == "step":
        if world > 1:
            dist.barrier()
        begun = time.perf_counter()
        train_step(model, optimizer, losses, batch, step, settings, ranks=ranks)
        pipe.send(time.perf_counter() - begun)
        step += 1


def config(hidden: int) -> ModelConfig:
    """2 layers of 16 experts, top-4."""
    layout = {"name": "uniform", "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": hidden}
    moe = MoEConfig(
        layout=layout,
        shared_expert={"name": "gated", "intermediate_size": 2 * hidden},
        backend={"name": "batched"},
        balance_losses=[{"name": "load_balance", "weight": 0.01, "scope": "sequence"}],
    )
    return ModelConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=hidden // 32, num_key_value_heads=2, moe=moe,
    )  # fmt: skip


if __name__ == "__main__":
    main()
