"""Upcycling speed at real size, against a raw direct write and a naive torch program, all in one run.

    python benchmarks/make_source.py /tmp/source --layers 2
    python benchmarks/upcycle.py /tmp/source /tmp/upcycle_benchmark

Writes up to 9 GB below the second folder and removes them. A round is a raw write, the hash sink and the whole
conversion, one right after the other, since the ratios are what a shared machine can tell.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moelab.config.load import load_config
from moelab.config.upcycle import UpcycleConfig
from moelab_upcycling.convert import convert, prepare, registry_of
from moelab_upcycling.plan import Plan
from moelab_upcycling.writer import BUFFER, ShardWriter


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-naive", action="store_true", help="without the naive program, which needs 9 GB of memory")
    arguments = parser.parse_args()
    loaded = load_config(["upcycle/qwen2_57b_a14b", f"source={arguments.source}"], UpcycleConfig)
    plan = prepare(loaded.config, registry_of(loaded.config))
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    workers = arguments.workers
    layers = range(plan.target.num_hidden_layers)
    nbytes = sum(shard.nbytes for shard in plan.shards if shard.layer_id in layers)
    print(f"{len(layers)} layers, {nbytes / 1e9:.2f} GB, {workers} workers, {os.cpu_count()} cores")
    output = arguments.scratch / "output"
    rows: list[tuple[float, float, float]] = []
    for number in range(arguments.rounds):
        raw = nbytes / 1e9 / timed(lambda: raw_write(arguments.scratch / "raw", nbytes))
        (arguments.scratch / "raw").unlink()
        before = processor_seconds()
        hashed = nbytes / 1e9 / timed(lambda: convert(plan, None, workers=workers, layers=layers))
        between = processor_seconds()
        whole = nbytes / 1e9 / timed(lambda: convert(plan, output, workers=workers, layers=layers))
        after = processor_seconds()
        shutil.rmtree(output)
        rows.append((raw, hashed, whole))
        print(
            f"round {number}: raw direct write {raw:.2f} GB/s, hash sink {hashed:.2f} GB/s, "
            f"end to end {whole:.2f} GB/s = {whole / raw:.0%} of raw; processor seconds a layer "
            f"{(between - before) / len(layers):.1f} and {(after - between) / len(layers):.1f}, "
            f"load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"largest worker {peak:.2f} GB of memory")
    print("median: " + ", ".join(f"{statistics.median(column):.2f}" for column in zip(*rows, strict=True)))
    if not arguments.no_naive:
        per_layer = nbytes / len(layers) / 1e9
        busy = time.process_time()
        compute, saving = naive_layer(plan, arguments.scratch / "naive.safetensors")
        busy = time.process_time() - busy
        hashed, whole = (statistics.median(column) for column in list(zip(*rows, strict=True))[1:])
        print(
            f"naive torch, {workers} threads: {compute:.1f} s a layer and {saving:.1f} s to save it, "
            f"{busy:.1f} processor seconds; "
            f"the hash sink is {compute / (per_layer / hashed):.1f} times as fast as its computing alone, "
            f"end to end {(compute + saving) / (per_layer / whole):.1f} times"
        )


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def processor_seconds() -> float:
    """Of all workers that have ended, which on a busy machine says more than the clock."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def raw_write(path: Path, nbytes: int) -> None:
    """The same bytes past the page cache, by the same writer, with nothing to compute."""
    writer = ShardWriter(path, nbytes)
    piece = np.random.default_rng(0).integers(0, 256, BUFFER, dtype=np.uint8)
    for start in range(0, nbytes, BUFFER):
        writer.write(piece[: nbytes - start])
    writer.commit()


def naive_layer(plan: Plan, path: Path) -> tuple[float, float]:
    """The same algorithm as one would write it in torch: (seconds for one layer's experts, to save them)."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    torch.set_num_threads(os.cpu_count() or 1)
    layout = plan.target.layouts[0]
    count, width, dense = layout.num_experts, layout.moe_intermediate_size, plan.target.intermediate_size
    dropped = width // 2
    started = time.perf_counter()
    weights = {}
    for file in sorted(Path(plan.sources[0]).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for matrix in ("gate", "up", "down"):
                name = f"model.layers.0.mlp.{matrix}_proj.weight"
                if name in tensors.keys():  # noqa: SIM118  (not a mapping)
                    weights[matrix] = tensors.get_tensor(name)
    copies = -(-count * width // dense)
    order = torch.cat([torch.randperm(dense) for _ in range(copies)])[: count * width].reshape(count, width)
    made = {}
    for expert in range(count):
        lost = torch.randperm(width)[:dropped]
        for matrix, weight in weights.items():
            axis = 1 if matrix == "down" else 0
            part = weight.index_select(axis, order[expert])
            old = part.index_select(axis, lost).float()
            new = torch.normal(float(old.mean()), float(old.std()), old.shape).to(part.dtype)
            made[f"{expert}.{matrix}"] = part.index_copy(axis, lost, new)
    compute = time.perf_counter() - started
    started = time.perf_counter()
    save_file(made, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    saving = time.perf_counter() - started
    path.unlink()
    return compute, saving


if __name__ == "__main__":
    main()
